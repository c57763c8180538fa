"""The model and its loss: everything a checkpoint is, and nothing of how it is trained."""
