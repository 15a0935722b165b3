"""Sources cut in two: examples to train on, and others that are held out.

Knows sources by their lengths alone.
"""

import hashlib
from collections.abc import Sequence
from random import Random

from ..example import Example
from .source import Source

HeldOut = int | float
"""Of a source: a number of examples, or a share of them between 0 and 1."""


class Part(Source):
    """Some examples of another source."""

    def __init__(self, whole: Source, indices: Sequence[int]) -> None:
        """
        Args:
            indices: of the examples, in the order in which this source has them.
        """
        self.whole, self.indices = whole, list(indices)

    @property
    def name(self) -> str:
        return self.whole.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.whole[self.indices[index]]

    def origin(self, index: int) -> int:
        return self.whole.origin(self.indices[index])

    def fingerprint(self) -> str | None:
        return self.whole.fingerprint()

    def identity(self) -> str:
        return hashlib.sha256(repr((self.whole.identity(), self.indices)).encode()).hexdigest()


def parted(source: Source, held_out: HeldOut, seed: str) -> tuple[Part, Part]:
    """What to train on, and what is held out; which examples these are depends on the seed and the length alone.

    Raises:
        ValueError: nothing would be left of one of the two.
    """
    total = len(source)
    number = round(held_out * total) if isinstance(held_out, float) else held_out
    if (isinstance(held_out, float) and not 0 < held_out < 1) or not 0 <= number < total:
        raise ValueError(
            f"val_split={held_out!r} of the {total} examples of {source.name}: give a share between 0 and 1 (0.05), or "
            "a number of examples that leaves some to train on"
        )
    number = max(number, 1) if isinstance(held_out, float) and total > 1 else number
    chosen = set(Random(seed).sample(range(total), number))
    return Part(source, [i for i in range(total) if i not in chosen]), Part(source, sorted(chosen))
