"""Checkpoints in files and directories, and where a run that is resumed goes on; knows nothing of pipelines."""
