"""Checkpoints in files and directories, and where a resumed run continues."""
