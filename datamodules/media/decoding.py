"""The sizes and pixels of images and videos, whatever their files are."""

from ..example import Image, Size, Video
from ..limits import Limits
from .images import image_size, read_image
from .opening import check_limits, opened
from .videos import check_reading, read_frames, video_size

__all__ = ["check_reading", "measure", "read_frames", "read_image"]


def measure(item: Image | Video, limits: Limits = Limits()) -> Size:
    """The size of an item: the one that its source knows, or that of its file. The first frame of a video is decoded.

    Args:
        limits: those of its source.

    Raises:
        ExampleError: the file is missing, broken, or too large to be decoded.
    """
    size = item.size
    if size is None:
        with opened(item.file, "read") as stream:
            size = image_size(stream, limits) if isinstance(item, Image) else video_size(stream, limits)
    check_limits(item.file, size, limits)
    return size
