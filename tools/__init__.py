"""lce-trainer: the command ``lce``."""
