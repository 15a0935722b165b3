"""The one schema that all sources return: an example is a list of messages whose parts are text, images and videos.

Nothing is opened or decoded here: an image is a place where bytes are, and its size if that is known already.
Knows nothing of tokenizers, models or ranks.
"""

import io
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

ROLES = ("system", "user", "assistant", "tool")


Roots = str | Path | Sequence[str | Path]
"""A folder that media lie in, or several: paths are relative to the first, and links may lead into all of them."""


class ExampleError(ValueError):
    """An example that cannot be trained on; `on_error` decides what becomes of it."""


@dataclass(frozen=True)
class File:
    """Bytes somewhere: a file, a part of one, or whatever `opener` opens.

    Attributes:
        name: what errors call it.
        opener: makes a seekable binary stream.
    """

    name: str
    opener: Callable[[], BinaryIO]

    @classmethod
    def at(cls, path: str | Path, root: Roots | None = None) -> "File":
        """A file on disk.

        Args:
            path: relative to `root`, or to the first of several.
            root: folders; in one of them the file must lie, symbolic links resolved.

        Raises:
            ExampleError: the path leads out of them, or nowhere.
        """
        if root is None:
            return cls(str(path), partial(_open_file, str(path)))
        roots = roots_of(root)
        whole = roots[0] / path
        try:
            place = whole.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise ExampleError(f"{str(path)!r} leads nowhere: {error}") from error
        if not any(place.is_relative_to(folder.resolve()) for folder in roots):
            allowed = ", ".join(str(folder) for folder in roots)
            raise ExampleError(
                f"{str(path)!r} leads out of the media root: it is {place}, and only files below {allowed} are read. "
                f"If it is meant, give media_root as a list, with {place.parent} behind {roots[0]}"
            )
        return cls(str(whole), partial(_open_file, str(place)))

    @classmethod
    def inside(cls, path: str | Path, name: str, offset: int, length: int) -> "File":
        """A run of bytes in a file, as a member of an uncompressed tar is."""
        return cls(f"{path}: {name}", partial(_read_part, str(path), offset, length))

    @classmethod
    def lazy(cls, name: str, load: Callable[[], bytes]) -> "File":
        """What a function gives when it is called."""
        return cls(name, partial(_read_lazily, load))

    def open(self) -> BinaryIO:
        return self.opener()


def roots_of(given: Roots) -> tuple[Path, ...]:
    """
    Raises:
        ValueError: there is none.
    """
    roots = (Path(given),) if isinstance(given, str | Path) else tuple(Path(folder) for folder in given)
    if not roots:
        raise ValueError("media_root is an empty list: give one folder at least")
    return roots


def _open_file(path: str) -> BinaryIO:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise ValueError("it is a folder, a pipe or a device, and no file")
    return open(path, "rb")


def _read_part(path: str, offset: int, length: int) -> BinaryIO:
    with open(path, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def _read_lazily(load: Callable[[], bytes]) -> BinaryIO:
    return io.BytesIO(load())


@dataclass(frozen=True)
class Size:
    """What has to be known of an image or video before it is decoded.

    Attributes:
        height, width: pixels, as displayed.
        frames: 1 for an image.
        seconds: duration of a video.
    """

    height: int
    width: int
    frames: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Image:
    """An image as part of a message, or to be made by a generator.

    Attributes:
        file: where it is.
        size: if the source knows it; else the file's header is read once, when the source is indexed.
    """

    file: File
    size: Size | None = None


@dataclass(frozen=True)
class Video:
    """A video as part of a message; attributes as of `Image`."""

    file: File
    size: Size | None = None


Part = str | Image | Video


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: "system", "user", "assistant" or "tool"; what the assistant says is learnt.
        parts: texts, images and videos in their order.
    """

    role: str
    parts: Sequence[Part]

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            raise TypeError("a message's parts are a list: Message('user', ['text'])")


@dataclass(frozen=True)
class Example:
    """What a source returns.

    Attributes:
        messages: the conversation.
        target: an image that a generator learns to make as the reply to it.
        name: what errors call it; empty: its number in its source.
    """

    messages: Sequence[Message] = field(default_factory=list)
    target: Image | None = None
    name: str = ""

    def check(self) -> None:
        """
        Raises:
            ExampleError: it is empty, or a role is not known.
        """
        if not any(part for message in self.messages for part in message.parts):
            raise ExampleError("is empty: it has no message with anything in it")
        for message in self.messages:
            if message.role not in ROLES:
                raise ExampleError(f"has a message of role {message.role!r}; roles are {', '.join(ROLES)}")

    @property
    def media(self) -> list[Image | Video]:
        """Images and videos of the messages, in their order."""
        return [part for message in self.messages for part in message.parts if not isinstance(part, str)]
