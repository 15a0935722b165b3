"""What prepares media for encoders: the number of rows of an item, which follows from the item's size, and the input
tensor, which the item's owner makes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bigmac_lightning.contracts.batch import MediaData

from ..example import Size

Augment = Callable[[Tensor], Tensor]
"""A torchvision v2 transform, or anything that maps uint8 pixels (..., C, H, W) to such."""


@dataclass(frozen=True)
class MediaPlan:
    """How an item will be prepared.

    Attributes:
        encoder: the model's name of its encoder.
        rows: number of feature rows.
        cost: encoder forward time in a unit shared by all items.
        height, width: in pixels after resizing, if `load` needs them; otherwise 0.
        frames: numbers of the frames of a video that are used; empty for an image.
        grid: (t, h, w) numbers of its patches, for models whose positions depend on them.
        text: the text that stands for it in the conversation, with `rows` tokens that features replace; ``None``:
            `rows` placeholder tokens one after another.
        seconds: duration of a time step of its grid, for models whose positions depend on it.
        alone: whether it is prepared as the only image of its example.
        longest: number of samples of the longest sound of its example, if it is filled up to that; otherwise 0.
        beside_images: whether it is no image, and its example also has images.
        one_token: whether all of its rows belong to one token, which they do not replace.
    """

    encoder: str
    rows: int
    cost: float
    height: int = 0
    width: int = 0
    frames: tuple[int, ...] = ()
    grid: tuple[int, int, int] | None = None
    text: str | None = None
    seconds: float | None = None
    alone: bool = True
    longest: int = 0
    beside_images: bool = False
    one_token: bool = False


class MediaProcessor(ABC):
    """Prepares media of a modality for one model."""

    def fingerprint(self) -> str:
        """A text that changes whenever plans would."""
        return repr(self)

    @abstractmethod
    def plan(self, item: Any, size: Size, alone: bool = True) -> MediaPlan:
        """How an item will be prepared. A plan is cheap to make, and the same on every rank.

        Args:
            item: a part of a message, such as an `Image`.
            alone: whether its example has no other image; some models cut such an image into more crops.

        Raises:
            ExampleError: the item cannot be prepared.
        """

    def plans(self, items: Sequence[Any], sizes: Sequence[Size]) -> list[MediaPlan]:
        """How all items of this modality in an example will be prepared. Override it where they depend on each other.

        Raises:
            ExampleError: see `plan`.
        """
        return [self.plan(item, size) for item, size in zip(items, sizes, strict=True)]

    @abstractmethod
    def load(self, item: Any, size: Size, plan: MediaPlan, augment: Augment | None = None) -> MediaData:
        """Read, decode and prepare an item; returns the value of `MediaItem.data`.

        Args:
            augment: changes the pixels of images and videos; ``None`` for other modalities.

        Raises:
            ExampleError: the file is broken.
        """
