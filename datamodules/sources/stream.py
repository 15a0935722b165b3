"""Streams of examples: sources whose length is not known, and which can only be read from start to end.

To train on a stream of your own, derive from `Stream`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..errors import ExampleError, reason_of
from ..example import Example
from ..limits import Limits
from ..permutation import key_of, permuted
from .source import Source

PIECE = 1024
"""Examples of a shuffled source whose order is found at once."""

Place = Any
"""A place in a stream. It goes into checkpoints: numbers, texts, and lists and dictionaries of them."""


class Stream(ABC):
    """Examples one after another. Every process reads all of them, in the same order.

    Attributes:
        limits: what its examples may have at most.
    """

    limits = Limits()

    @property
    def name(self) -> str:
        """What errors and logs call it."""
        return type(self).__name__

    def origin(self, index: int) -> int:
        """The number by which errors call an example."""
        return index

    @abstractmethod
    def read(self, repeat: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        """Each example with the place after it; or an error in place of an example that cannot be read.

        Args:
            repeat: how often the stream has been read to its end before. The order may depend on it.
            place: where to continue: after the example that came with this place; ``None``: at the start.
        """

    def part(self, number: int, parts: int) -> "Stream":
        """A part of the stream: all parts together have each example once.

        By default a part reads the whole stream, and leaves out the examples of other parts. A stream of many files can
        return one that reads its own files.

        Args:
            number: of the part, from 0 on.
            parts: number of parts.
        """
        return self if parts == 1 else _EveryNth(self, number, parts)


class _EveryNth(Stream):
    """The examples number, number + parts, ... of another stream. A place is how many of its examples came before,
    and its own place."""

    def __init__(self, whole: Stream, number: int, parts: int) -> None:
        self._whole, self._number, self._parts, self.limits = whole, number, parts, whole.limits

    @property
    def name(self) -> str:
        return self._whole.name

    def origin(self, index: int) -> int:
        return self._whole.origin(index)

    def read(self, repeat: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        before, own = place or (0, None)
        for count, (example, after) in enumerate(self._whole.read(repeat, own), start=before):
            if count % self._parts == self._number:
                yield example, [count + 1, after]


class SourceStream(Stream):
    """A `Source` that is read as a stream, so that it can be mixed with streams."""

    def __init__(self, source: Source, seed: int = 0, shuffle: bool = True, number: int = 0, parts: int = 1) -> None:
        """
        Args:
            seed: of the order.
            shuffle: whether the order is random, and another one in each repeat.
            number, parts: the stream has the examples at the places number, number + parts, ... of the order.
        """
        self.source, self.seed, self.shuffle, self.limits = source, seed, shuffle, source.limits
        self._number, self._parts = number, parts

    @property
    def name(self) -> str:
        return self.source.name

    def read(self, repeat: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        start = self._number if place is None else place
        for at, index in enumerate(self._order(repeat, start)):
            try:
                example: Example | ExampleError = self.source[index]
            except Exception as error:  # a source may raise anything
                example = ExampleError(reason_of(error))
            yield example, start + self._parts * (at + 1)

    def part(self, number: int, parts: int) -> Stream:
        return SourceStream(self.source, self.seed, self.shuffle, number, parts)

    def _order(self, repeat: int, start: int) -> Iterator[int]:
        """The indices of the examples from a place on."""
        size, key = len(self.source), key_of(f"{self.seed}/{repeat}")
        for first in range(start, size, PIECE * self._parts):
            places = np.arange(first, min(first + PIECE * self._parts, size), self._parts)
            if self.shuffle:
                places = permuted(places, np.full(len(places), size), np.full(len(places), key))
            yield from places.tolist()


class Taken(Source):
    """The first examples of a stream, in memory: to evaluate on, or to inspect."""

    def __init__(self, stream: Stream, examples: int) -> None:
        """
        Args:
            examples: number of examples; a shorter stream has fewer.
        """
        self._name, self.limits = f"the start of {stream.name}", stream.limits
        self._examples = [example for example, _ in islice(stream.read(0), examples)]

    @property
    def name(self) -> str:
        return self._name

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        if isinstance(example, ExampleError):
            raise example
        return example
