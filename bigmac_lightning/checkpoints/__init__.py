"""Checkpoints in files and directories, and the place at which a resumed run continues."""
