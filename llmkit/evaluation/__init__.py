"""What a model is worth: held-out text and HellaSwag."""
