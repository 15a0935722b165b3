"""Sources cut in two: examples to train on, and others that are held out.

Knows sources by their lengths alone.
"""

import hashlib
from collections.abc import Sequence
from random import Random

import numpy as np

from ..example import Example
from .source import Source
from .stream import Stream

HeldOut = int | float
"""Of a source: a number of examples, or a share of them between 0 and 1."""


class Part(Source):
    """Some examples of another source."""

    def __init__(self, whole: Source, indices: Sequence[int]) -> None:
        """
        Args:
            indices: of the examples, in the order in which this source has them.
        """
        self.whole, self.indices = whole, np.array(indices, dtype=np.int64)

    @property
    def name(self) -> str:
        return self.whole.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.whole[int(self.indices[index])]

    def origin(self, index: int) -> int:
        return self.whole.origin(int(self.indices[index]))

    def fingerprint(self) -> str | None:
        return self.whole.fingerprint()

    def identity(self) -> str:
        return hashlib.sha256(self.whole.identity().encode() + self.indices.tobytes()).hexdigest()


def held_out_of(
    sources: Sequence[Source | Stream], wanted: HeldOut | Sequence[HeldOut], seed: int
) -> tuple[list[Source | Stream], list[Source]]:
    """What of training sources is left to train on, and what is held out.

    Args:
        wanted: of each source, or of all alike; 0: nothing.

    Raises:
        ValueError: it cannot be held out.
    """
    shares = [wanted] * len(sources) if isinstance(wanted, int | float) else list(wanted)
    if len(shares) != len(sources):
        raise ValueError(f"mixture.val_split={shares} for {len(sources)} training sources: give one for each")
    train, held_out = list[Source | Stream](), list[Source]()
    for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
        if not share:
            train.append(source)
        elif isinstance(source, Stream):
            raise ValueError(
                f"mixture.val_split={wanted!r}, but {source.name} is a stream, of which nothing can be held out: give "
                "mixture.val_split for each source, 0 for it, and examples of another stream as val, Taken(stream, 500)"
            )
        else:
            rest, part = parted(source, share, f"{seed}/val/{number}")
            train.append(rest)
            held_out.append(part)
    return train, held_out


def parted(source: Source, held_out: HeldOut, seed: str) -> tuple[Part, Part]:
    """What to train on, and what is held out; which examples these are depends on the seed and the length alone.

    Raises:
        ValueError: nothing would be left of one of the two.
    """
    total = len(source)
    number = round(held_out * total) if isinstance(held_out, float) else held_out
    if (isinstance(held_out, float) and not 0 < held_out < 1) or not 0 <= number < total:
        raise ValueError(
            f"mixture.val_split={held_out!r} of the {total} examples of {source.name}: give a share between 0 and 1 "
            "(0.05), or a number of examples that leaves some to train on"
        )
    number = max(number, 1) if isinstance(held_out, float) and total > 1 else number
    chosen = set(Random(seed).sample(range(total), number))
    return Part(source, [i for i in range(total) if i not in chosen]), Part(source, sorted(chosen))
