"""Pictures that one process encodes for their features and also learns to draw: their latents are made once.

Shape suffixes: C channels, h and w cells.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from bigmac_lightning.contracts.batch import MediaItem, TargetItem


class Latents:
    """The latents of a picture, from its encoding until its loss."""

    def __init__(self) -> None:
        self._made: Tensor | None = None
        self._wanted = True

    def give(self, made_Chw: Tensor) -> None:
        """Keep them, if the loss is still to come: a picture may be encoded again for the backward."""
        self._made = made_Chw if self._wanted else None

    def take(self) -> Tensor | None:
        """The latents, which are kept no longer; ``None``: they were not made here."""
        made, self._made, self._wanted = self._made, None, False
        return made


@dataclass
class LearntPicture(MediaItem):
    """A picture with noise.

    Attributes:
        latents: where its latents are kept for the target's loss; ``None``: the target is on another rank.
    """

    latents: Latents | None = None


@dataclass
class LearntTarget(TargetItem):
    """The target of a picture with noise.

    Attributes:
        latents: where its latents are, once the picture is encoded; ``None``: the picture is on another rank.
        encoded: the latents themselves, while its loss is computed.
    """

    latents: Latents | None = None
    encoded: Tensor | None = None


def linked(item: MediaItem, target: TargetItem) -> tuple[MediaItem, TargetItem]:
    """An item and a target that have their latents in common."""
    latents = Latents()
    return LearntPicture(**vars(item), latents=latents), LearntTarget(**vars(target), latents=latents)


def with_latents(target: TargetItem) -> TargetItem:
    """A target with its latents, if they are known."""
    if not isinstance(target, LearntTarget) or target.latents is None:
        return target
    return replace(target, encoded=target.latents.take())
