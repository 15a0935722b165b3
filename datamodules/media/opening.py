"""Opens media files, and names in every error the file that is broken."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from ..errors import ExampleError, reason_of
from ..example import Size
from ..files import File
from ..limits import Limits


@contextmanager
def opened(file: File, done: str) -> Iterator[BinaryIO]:
    """The file as a stream. Errors in the block that uses it get the file's name.

    Args:
        done: what is done with the file: "read" or "decoded".

    Raises:
        ExampleError: anything that goes wrong.
    """
    try:
        with file.open() as stream:
            yield stream
    except ExampleError:
        raise
    except Exception as error:
        raise ExampleError(f"{file.name} cannot be {done}: {reason_of(error)}") from error


def check_limits(file: File, size: Size, limits: Limits) -> None:
    """
    Raises:
        ExampleError: the item is empty, or too large to be decoded.
    """
    if size.height * size.width > limits.pixels:
        raise ExampleError(limits.exceeded("pixels", f"{file.name} has {size.height} x {size.width} pixels"))
    if min(size.height, size.width, size.frames) < 1:
        raise ExampleError(f"{file.name} is empty: {size}")


def check_same(file: File, found: object, measured: object) -> None:
    """
    Raises:
        ExampleError: the file is not the one that was measured.
    """
    if found != measured:
        raise ExampleError(
            f"{file.name} is another than was measured: {found} instead of {measured}. If it was replaced, or if the "
            "source gives wrong sizes, correct that; sizes of an earlier run are in loading.cache_dir"
        )
