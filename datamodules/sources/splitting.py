"""Splits sources into examples to train on and examples that are held out."""

import hashlib
from collections.abc import Sequence
from random import Random

import numpy as np

from ..example import Example
from ..left_out import remaining
from .source import Source
from .stream import Stream

HeldOut = int | float
"""How much of a source is held out: a number of examples, or a share of them between 0 and 1."""


class SourceSubset(Source):
    """Some examples of another source."""

    def __init__(self, whole: Source, indices: Sequence[int]) -> None:
        """
        Args:
            indices: the indices of the examples, in the order in which the subset has them.
        """
        self.whole, self.indices, self.limits = whole, np.array(indices, dtype=np.int64), whole.limits

    @property
    def name(self) -> str:
        return self.whole.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.whole[self.at(index)]

    def at(self, index: int) -> int:
        """The index in the whole source."""
        return int(self.indices[index])

    def origin(self, index: int) -> int:
        return self.whole.origin(self.at(index))

    def fingerprint(self) -> str | None:
        return self.whole.fingerprint()

    def identity(self) -> str:
        own = f"{type(self).__name__} {self.whole.identity()}".encode()
        return hashlib.sha256(own + self.indices.tobytes()).hexdigest()


class SourceRest(SourceSubset):
    """The examples of another source without some of them."""

    def __init__(self, whole: Source, left_out: Sequence[int]) -> None:
        """
        Args:
            left_out: the indices of those that it does not have, sorted.
        """
        super().__init__(whole, left_out)

    def __len__(self) -> int:
        return len(self.whole) - len(self.indices)

    def at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return int(remaining(np.array([index]), self.indices)[0])


def hold_out(
    sources: Sequence[Source | Stream], val_split: HeldOut | Sequence[HeldOut], seed: int
) -> tuple[list[Source | Stream], list[Source]]:
    """Split training sources into what is left to train on and what is held out.

    Args:
        val_split: how much of each source is held out, or one number for all sources; 0: nothing.

    Raises:
        ValueError: the examples cannot be held out.
    """
    amounts = [val_split] * len(sources) if isinstance(val_split, int | float) else list(val_split)
    if len(amounts) != len(sources):
        raise ValueError(f"mixture.val_split={amounts} for {len(sources)} training sources: give one for each")
    train, held_out = list[Source | Stream](), list[Source]()
    for number, (source, amount) in enumerate(zip(sources, amounts, strict=True)):
        if not amount:
            train.append(source)
        elif isinstance(source, Stream):
            raise ValueError(
                f"mixture.val_split={val_split!r}, but {source.name} is a stream, of which nothing can be held out: "
                "give one number for each source, 0 for the stream, and add examples of another stream to val: "
                "Taken(stream, 500)"
            )
        else:
            rest, subset = _split(source, amount, f"{seed}/val/{number}")
            train.append(rest)
            held_out.append(subset)
    return train, held_out


def _split(source: Source, amount: HeldOut, seed: str) -> tuple[SourceRest, SourceSubset]:
    """What is left to train on, and what is held out. The choice depends only on the seed and the source's length.

    Raises:
        ValueError: one of the two would be empty.
    """
    total = len(source)
    number = round(amount * total) if isinstance(amount, float) else amount
    if (isinstance(amount, float) and not 0 < amount < 1) or not 0 <= number < total:
        raise ValueError(
            f"mixture.val_split={amount!r} of the {total} examples of {source.name}: give a share between 0 and 1 "
            "(0.05), or a number of examples that leaves some to train on"
        )
    number = max(number, 1) if isinstance(amount, float) and total > 1 else number
    held_out = sorted(Random(seed).sample(range(total), number))
    return SourceRest(source, held_out), SourceSubset(source, held_out)
