"""Text to tokens to training windows: nothing here knows a model or a trainer."""
