"""Opens media files and says which file is broken, and how. Knows files; knows nothing of what is in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import PIL

from ..example import ExampleError, File, Size

MAX_PIXELS = 64 * 1024 * 1024
"""Of an image, or of one frame: a small file may decompress to far more memory than there is."""


@contextmanager
def opened(file: File, done: str) -> Iterator[BinaryIO]:
    """The file as a stream, whose errors tell its name.

    Args:
        done: what is done with it: "read" or "decoded".

    Raises:
        ExampleError: whatever goes wrong.
    """
    try:
        with file.open() as stream:
            yield stream
    except ExampleError:
        raise
    except Exception as error:
        raise ExampleError(f"{file.name} cannot be {done}: {_reason(error)}") from error


def check_limits(file: File, size: Size) -> None:
    """
    Raises:
        ExampleError: it is too large to be decoded, or empty.
    """
    if size.height * size.width > MAX_PIXELS:
        raise ExampleError(f"{file.name} has {size.height} x {size.width} pixels; the most is {MAX_PIXELS:,}")
    if min(size.height, size.width, size.frames) < 1:
        raise ExampleError(f"{file.name} is empty: {size}")


def check_same(file: File, found: object, measured: object) -> None:
    """
    Raises:
        ExampleError: it is another than was measured.
    """
    if found != measured:
        raise ExampleError(
            f"{file.name} is another than was measured: {found} instead of {measured}. If it was replaced, or if the "
            "source gives wrong sizes, correct that; sizes of an earlier run are in loading.cache_dir"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "not an image, or broken from its first bytes on"
    if type(error) is ValueError:
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return f"{type(error).__name__}: {error}"
