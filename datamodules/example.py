"""The one schema that all sources return: an example is a list of messages whose parts are text, images and videos.

Nothing is opened or decoded here: an image is a place where bytes are, and its size if that is known already.
Knows nothing of tokenizers, models or ranks.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

ROLES = ("system", "user", "assistant", "tool")


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
    def at(cls, path: str | Path, root: str | Path | None = None) -> "File":
        """A file on disk.

        Args:
            path: relative to `root`, if there is one.
            root: the folder that the file must lie in, symbolic links resolved.

        Raises:
            ExampleError: the path leads out of the root.
        """
        whole = Path(path) if root is None else Path(root) / path
        if root is not None and not whole.resolve().is_relative_to(Path(root).resolve()):
            raise ExampleError(f"{str(path)!r} leads out of the media root {root}: only files below it are read")
        return cls(str(whole), partial(open, str(whole), "rb"))

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
