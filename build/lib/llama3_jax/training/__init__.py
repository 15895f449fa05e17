"""The step: optimizer, checkpoint, metrics, progress."""
