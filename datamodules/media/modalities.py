"""The table of modalities: everything that is particular to a kind of media, in one entry for each.

Sources, chat templates, measuring and packing go by this table alone. What encoders get of an item, a `MediaProcessor`
makes. A modality of your own joins with `register` (docs/data.md has an example)::

    register(Modality("signal", Signal, measure=number_of_steps, endings=(".csv",)))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..errors import ExampleError
from ..example import Audio, Image, MediaPart, Size, Video
from ..limits import Limits
from .frame_choice import evenly_spaced
from .images import image_size, read_image
from .sounds import sound_size
from .videos import read_frames, video_size

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGES += (".avif", ".heic", ".heif", ".jp2", ".pgm", ".ppm")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".flv", ".m4v", ".mpeg", ".mpg", ".ts", ".wmv")
AUDIOS = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".wma")


@dataclass(frozen=True)
class Modality:
    """A kind of media.

    Attributes:
        name: its type in data, such as "image": ``{"type": "image", "path": ...}`` and ``{"type": "image_url", ...}``
            as parts of a message, ``<image>`` in a text, and "image" or "images" as keys of a record.
        part: the class of its items in messages.
        measure: reads the size of an item from its file, without decoding what need not be decoded. It may raise any
            exception if the file is broken.
        endings: of its files, by which members of tars are known.
        mime: how the type of its ``data:`` URIs begins; empty: any type is taken.
        view: makes pictures of an item for `bigmac data`, each (C, H, W), uint8; ``None``: there are none.
    """

    name: str
    part: type[MediaPart]
    measure: Callable[[BinaryIO, Limits], Size]
    endings: Sequence[str] = ()
    mime: str = ""
    view: Callable[[Any, Size, int], Sequence[Any]] | None = None

    def __post_init__(self) -> None:
        taken = self.name in ("text", "path", "url", "base64", "type") or self.name.endswith("_url")
        if not (self.name.isidentifier() and self.name.islower()) or taken:
            raise ValueError(f"Modality(name={self.name!r}): give a word in lower case that is no key of messages")

    @property
    def token(self) -> str:
        """The token that stands for an item in a text, unless a processor or `ChatOptions.tokens` has another."""
        return f"<|{self.name}_pad|>"

    @property
    def placeholder(self) -> str:
        """What stands for an item in a text of a source."""
        return f"<{self.name}>"


def _view_image(item: Image, size: Size, most: int) -> list[Any]:
    return [read_image(item.file, size)]


def _view_video(item: Video, size: Size, most: int) -> list[Any]:
    return list(read_frames(item.file, size, evenly_spaced(size.frames, min(most, size.frames))))


MODALITIES: dict[str, Modality] = {
    modality.name: modality
    for modality in (
        Modality("image", Image, image_size, IMAGES, "image/", _view_image),
        Modality("video", Video, video_size, VIDEOS, "video/", _view_video),
        Modality("audio", Audio, sound_size, AUDIOS, "audio/"),
    )
}
"""All modalities by name, in the order in which captions come after media."""


def register(modality: Modality) -> None:
    """Add a modality. Call it where its class of items is defined, so that every process does. A class that is defined
    again, as in a notebook, takes the place of the former one.

    Raises:
        ValueError: another one has the same name, class or file ending.
    """
    for known in MODALITIES.values():
        if (known.name, *_place(known.part)) == (modality.name, *_place(modality.part)):
            continue
        if known.name == modality.name or known.part is modality.part:
            raise ValueError(f"the modality {modality.name!r} has the name or the class of another one, {known}")
        if both := sorted({*known.endings} & {*modality.endings}):
            raise ValueError(f"files {', '.join(both)} are of the modality {known.name!r} already")
    MODALITIES[modality.name] = modality


def _place(kind: type) -> tuple[str, str]:
    """Where a class is defined."""
    return kind.__module__, kind.__qualname__


def modality_of(item: MediaPart) -> Modality:
    """
    Raises:
        ExampleError: the class of the item is in no modality.
    """
    for modality in MODALITIES.values():
        if type(item) is modality.part:
            return modality
    raise ExampleError(f"has a {type(item).__name__}, which is of no modality: call register(Modality(...)) for it")


def any_of_them() -> str:
    """All modalities in words: "image, video or audio"."""
    *most, last = MODALITIES
    return f"{', '.join(most)} or {last}"
