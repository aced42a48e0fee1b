"""lce-trainer: how a job is started."""
