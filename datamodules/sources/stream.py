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


class SourceStream(Stream):
    """A `Source` that is read as a stream, so that it can be mixed with streams."""

    def __init__(self, source: Source, seed: int = 0, shuffle: bool = True) -> None:
        """
        Args:
            seed: of the order.
            shuffle: whether the order is random, and another one in each repeat.
        """
        self.source, self.seed, self.shuffle, self.limits = source, seed, shuffle, source.limits

    @property
    def name(self) -> str:
        return self.source.name

    def read(self, repeat: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        for number, index in enumerate(self._order(repeat, place or 0), start=place or 0):
            try:
                example: Example | ExampleError = self.source[index]
            except Exception as error:  # a source may raise anything
                example = ExampleError(reason_of(error))
            yield example, number + 1

    def _order(self, repeat: int, start: int) -> Iterator[int]:
        """The indices of the examples from a place on."""
        size, key = len(self.source), key_of(f"{self.seed}/{repeat}")
        for first in range(start, size, PIECE):
            places = np.arange(first, min(first + PIECE, size))
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
