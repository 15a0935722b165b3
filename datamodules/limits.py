"""What data may have at most, so that a small hostile file cannot take all memory, disk or time."""

from dataclasses import dataclass, fields

from .errors import ExampleError

LARGEST_PILLOW = 178_956_970
"""The most pixels of an image that Pillow opens at all, unless `PIL.Image.MAX_IMAGE_PIXELS` is changed."""

MiB, GiB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Limits:
    """The limits of a source. Examples that exceed one are broken examples, see `on_error` of the DataModule.

    Attributes:
        pixels: pixels of an image, or of a frame of a video.
        frames: frames of a video.
        seconds: seconds of a sound.
        image_bytes: bytes of an image file.
        record_bytes: bytes of a JSON line, of a text, or of a caption, without the media files that it names.
        growth: how many times their own size data files may have when the `datasets` library has decompressed them;
            `always_allowed` bytes are allowed in any case.
        always_allowed: see `growth`.
    """

    pixels: int = 64 * MiB
    frames: int = 4 * MiB
    seconds: int = 4 * 60 * 60
    image_bytes: int = 1 * GiB
    record_bytes: int = 512 * MiB
    growth: int = 200
    always_allowed: int = 1 * GiB

    def __post_init__(self) -> None:
        for given in fields(self):
            value = getattr(self, given.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"limits.{given.name}={value!r}: give a number of at least 1")
        if self.pixels > LARGEST_PILLOW:
            raise ValueError(f"limits.pixels={self.pixels}: Pillow opens no image of more than {LARGEST_PILLOW} pixels")

    def check_record(self, length: int, what: str = "it") -> None:
        """
        Args:
            length: bytes of a record, before it is read.
            what: what errors call it.

        Raises:
            ExampleError: it is too long.
        """
        if length > self.record_bytes:
            raise ExampleError(self.exceeded("record_bytes", f"{what} has {length:,} bytes"))

    def exceeded(self, name: str, found: str) -> str:
        """The text of an error.

        Args:
            name: the limit that is exceeded.
            found: what was found.
        """
        return f"{found}; the most is {getattr(self, name):,}. If this is meant, raise limits.{name} of the source"
