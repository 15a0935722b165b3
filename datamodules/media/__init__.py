"""Images and videos in files: how large they are, and what they show."""
