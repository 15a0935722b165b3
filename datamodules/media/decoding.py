"""The sizes of media, and the pixels of images and videos, whatever their files are."""

from ..example import MediaPart, Size
from ..limits import Limits
from .images import read_image
from .modalities import modality_of
from .opening import check_limits, opened
from .videos import check_reading, read_frames

__all__ = ["check_reading", "measure", "read_frames", "read_image"]


def measure(item: MediaPart, limits: Limits = Limits()) -> Size:
    """The size of an item: the one that its source knows, or that of its file. The first frame of a video is decoded.

    Args:
        limits: those of its source.

    Raises:
        ExampleError: the file is missing, broken, or too large to be decoded.
    """
    size = item.size
    if size is None:
        modality = modality_of(item)
        with opened(item.file, "read") as stream:
            size = modality.measure(stream, limits)
    check_limits(item.file, size, limits)
    return size
