"""Use of a trained model: continue a text, hold a conversation."""
