"""What a stream of examples is: a source whose length nobody knows, and that can only be read from front to back.

To train on one of your own, derive from `Stream`. Knows examples; knows nothing of tokenizers, models or ranks.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ..example import Example, ExampleError
from .source import Source

Place = Any
"""Where a stream stands: numbers, texts, and lists and dicts of such, as they go into checkpoints."""


class Stream(ABC):
    """Examples one after another. Every process that needs any of them reads all: the same ones in the same order."""

    @property
    def name(self) -> str:
        """What errors and logs call it."""
        return type(self).__name__

    def origin(self, index: int) -> int:
        """The number of an example that errors give."""
        return index

    @abstractmethod
    def read(self, turn: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        """Each example with the place behind it, or an error for what cannot be read as one.

        Args:
            turn: how often the stream has been read to its end before; it may have another order each time.
            place: go on behind the example that this place came with; ``None``: from the start.
        """


class SourceStream(Stream):
    """A `Source` as a stream, to be mixed with others."""

    def __init__(self, source: Source, seed: int = 0, shuffle: bool = True) -> None:
        """
        Args:
            seed, shuffle: another order in each turn.
        """
        self.source, self.seed, self.shuffle = source, seed, shuffle

    @property
    def name(self) -> str:
        return self.source.name

    def read(self, turn: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        order = list(range(len(self.source)))
        if self.shuffle:
            random.Random(f"{self.seed}/{turn}").shuffle(order)
        for number, index in enumerate(order[place or 0 :], start=place or 0):
            try:
                example: Example | ExampleError = self.source[index]
            except Exception as error:  # a source may raise what it likes
                known = isinstance(error, ExampleError)
                example = error if known else ExampleError(f"{type(error).__name__}: {error}")
            yield example, number + 1


class Taken(Source):
    """The first examples of a stream, kept in memory: to evaluate on, or to look at."""

    def __init__(self, stream: Stream, examples: int) -> None:
        """
        Args:
            examples: how many; fewer if there are not as many.
        """
        self._name = f"the start of {stream.name}"
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
