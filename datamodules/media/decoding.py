"""Images and videos of a message: how large they are, and what they show.

Knows the two kinds of media; images.py and videos.py know their files.
"""

from ..example import Image, Size, Video
from .images import image_size, read_image
from .opening import check_limits, opened
from .videos import check_reading, read_frames, video_size

__all__ = ["check_reading", "measure", "read_frames", "read_image"]


def measure(item: Image | Video) -> Size:
    """The size of an item: what its source knows, else from its file. Of a video, the first frame is decoded for it.

    Raises:
        ExampleError: the file is missing or broken, or too large to be decoded.
    """
    size = item.size
    if size is None:
        with opened(item.file, "read") as stream:
            size = image_size(stream) if isinstance(item, Image) else video_size(stream)
    check_limits(item.file, size)
    return size
