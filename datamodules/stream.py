"""What a stream of examples is: a source whose length nobody knows, and that can only be read from front to back.

To train on one of your own, derive from `Stream`. Knows examples; knows nothing of tokenizers, models or ranks.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from .example import Example, ExampleError, File, Image, Roots, roots_of
from .records import check_columns, example_of_record
from .source import Source
from .sources import content_of, undecoded

Place = Any
"""Where a stream stands: numbers, texts, and lists and dicts of such, as they go into checkpoints."""


class Stream(ABC):
    """Examples one after another. Every process that needs any of them reads all: the same ones in the same order."""

    @property
    def name(self) -> str:
        """What errors and logs call it."""
        return type(self).__name__

    @abstractmethod
    def read(self, turn: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        """Each example with the place behind it, or an error for what cannot be read as one.

        Args:
            turn: how often the stream has been read to its end before; it may have another order each time.
            place: go on behind the example that this place came with; ``None``: from the start.
        """


class HFStream(Stream):
    """Rows of whatever the `datasets` library streams: Parquet, JSON lines and the like, from disk or from afar.

    Columns as of `HFDataset`. The order of files is another in each turn, from version 5 of `datasets` on.
    """

    def __init__(
        self,
        path: Any,
        data_files: str | Sequence[str] | None = None,
        split: str = "train",
        media_root: Roots = ".",
        shuffle: bool = True,
        ignore: Sequence[str] = (),
    ) -> None:
        """
        Args:
            path, data_files, split: as of `datasets.load_dataset`; or `path` is a `datasets.IterableDataset`. Without
                a `shuffle` of its own, in which no place can be told: the DataModule shuffles within its window.
            media_root: folder of media given by path, or several, as of `Roots`.
            shuffle: the order of the files.
            ignore: columns that are left out; others that are not known are refused.
        """
        import datasets

        files = data_files if data_files is None or isinstance(data_files, str) else list(data_files)
        rows: Any = path
        if not isinstance(path, datasets.IterableDataset):
            rows = datasets.load_dataset(path, data_files=files, split=split, streaming=True)
        self._rows = undecoded(rows)
        self.media_roots, self.shuffle, self.ignore = roots_of(media_root), shuffle, tuple(ignore)
        self._label = f"{path if isinstance(path, str) else 'IterableDataset'} {data_files or ''}".strip()

    @property
    def name(self) -> str:
        return self._label

    def read(self, turn: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        rows = self._rows
        rows.set_epoch(turn + 1 if self.shuffle else 0)
        rows.load_state_dict(place)
        for batch in rows.iter(batch_size=1):  # in a worker, iter(rows) would give it a part of the rows
            row = {name: values[0] for name, values in batch.items()}
            try:
                example: Example | ExampleError = self._example(row)
            except ExampleError as error:
                example = error
            yield example, rows.state_dict()

    def _example(self, row: Mapping[str, Any]) -> Example:
        check_columns(row)
        column = "images" if row.get("images") is not None else "image"
        given = row.get(column)
        items = [] if given is None else given if isinstance(given, list) else [given]
        images = [
            Image(File.lazy(f"{self.name}, image {k}", partial(content_of, item, self.media_roots)))
            for k, item in enumerate(items)
        ]
        return example_of_record(row, images, [], used=(column, *self.ignore))


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
