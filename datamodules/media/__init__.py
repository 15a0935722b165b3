"""Images and videos in files: their sizes and their pixels."""
