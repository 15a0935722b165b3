"""Rows of the `datasets` library, as a source and as a stream. records.py makes examples of the rows."""

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ExampleError
from ..example import Example
from ..files import File, Roots, folders_of
from ..limits import Limits
from .bounded import Bounded
from .data_files import missing
from .records import DESCRIBE, FORMS, Records, check_columns, media_keys
from .source import Source
from .stream import Place, Stream

NEEDED = ("messages", "conversations", "completion", "text", "caption")


class HFDataset(Source):
    """Rows of anything that the `datasets` library reads (Parquet, Arrow, its own formats), memory-mapped.

    Columns are the keys of `Records`. Columns of media have bytes, or paths below the media root.
    """

    def __init__(
        self,
        path: str,
        data_files: str | Sequence[str] | None = None,
        split: str = "train",
        media_root: Roots = ".",
        ignore: Sequence[str] = (),
        prompt: str = DESCRIBE,
        limits: Limits = Limits(),
    ) -> None:
        """
        Args:
            path, data_files, split: see `datasets.load_dataset`: ``HFDataset("parquet", "shards/*.parquet")``.
            media_root: the folder of media that are given by path, or several folders, see `Roots`.
            ignore: columns that are left out; other columns that are not known are refused.
            prompt: the user's words for rows that are only a caption.
            limits: what its examples and files may have at most.
        """
        rows: Any = undecoded(_loaded(path, data_files, split, False, limits, type(self).__name__))
        self.media_roots, self.limits = folders_of(media_root, "media_root"), limits
        self.records = Records(self.media_roots, tuple(ignore), prompt)
        columns = [name for name in rows.column_names if name not in ignore]
        if not set(NEEDED) & set(columns):
            raise ValueError(f"the rows have columns {rows.column_names}: {FORMS} is needed")
        media = [name for name in columns if name in (*media_keys(), "target")]
        self._rows = rows
        self._texts = rows.select_columns([name for name in columns if name not in media])
        self._media = rows.select_columns(media).with_format("arrow") if media else None
        self._label = f"{path} {data_files or ''}".strip()

    @property
    def name(self) -> str:
        return self._label

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        return self._rows._fingerprint

    def identity(self) -> str:
        return repr((type(self).__qualname__, self._label, self.records.identity()))

    def __getitem__(self, index: int) -> Example:
        row = self._texts[index]
        check_columns(row)
        return self.records.example({**row, **self._files(index)}, name=f"row {index}")

    def _files(self, index: int) -> dict[str, list[Any]]:
        """The media of a row by their columns: paths, or, for bytes, files that read them when they are opened."""
        found: dict[str, list[Any]] = {}
        if self._media is None:
            return found
        table = self._media[index]
        for column in table.column_names:
            found[column] = [
                File.lazy(f"{self.name}, row {index}, {column} {k}", partial(self._read, index, column, k))
                if _holds_bytes(item)
                else item.as_py()
                for k, item in enumerate(_items(table[column][0]))
            ]
        targets = found.pop("target", [])
        if len(targets) > 1:
            raise ExampleError(f"has {len(targets)} targets; one can be made")
        return {**found, "target": targets[0]} if targets else found

    def _read(self, index: int, column: str, number: int) -> bytes:
        assert self._media is not None
        given = _items(self._media[index][column][0])[number].as_py()
        return given if isinstance(given, bytes) else given["bytes"]


class HFStream(Stream):
    """Rows of anything that the `datasets` library streams: Parquet, JSON lines and others, local or remote.

    Columns are those of `HFDataset`. From version 5 of `datasets` on, each repeat has another order of files.
    """

    def __init__(
        self,
        path: Any,
        data_files: str | Sequence[str] | None = None,
        split: str = "train",
        media_root: Roots = ".",
        shuffle: bool = True,
        ignore: Sequence[str] = (),
        prompt: str = DESCRIBE,
        limits: Limits = Limits(),
    ) -> None:
        """
        Args:
            path, data_files, split: see `datasets.load_dataset`; or `path` is a `datasets.IterableDataset`. It must not
                have a `shuffle` of its own, which could not be resumed: the DataModule shuffles within its buffer.
            media_root: the folder of media that are given by path, or several folders, see `Roots`.
            shuffle: whether the order of files is random.
            ignore: columns that are left out; other columns that are not known are refused.
            prompt: the user's words for rows that are only a caption.
            limits: what its examples and files may have at most.
        """
        import datasets

        rows: Any = path
        if not isinstance(path, datasets.IterableDataset):
            rows = _loaded(path, data_files, split, True, limits, type(self).__name__)
        self._rows: Any = undecoded(rows)
        self.media_roots, self.shuffle, self.limits = folders_of(media_root, "media_root"), shuffle, limits
        self.records = Records(self.media_roots, tuple(ignore), prompt)
        self._label = f"{path if isinstance(path, str) else 'IterableDataset'} {data_files or ''}".strip()

    @property
    def name(self) -> str:
        return self._label

    def part(self, number: int, parts: int) -> Stream:
        if self._rows.num_shards < parts:
            return super().part(number, parts)
        own = copy(self)
        own._rows = self._rows.shard(parts, number)
        return own

    def read(self, repeat: int, place: Place = None) -> Iterator[tuple[Example | ExampleError, Place]]:
        rows = deepcopy(self._rows)  # the library shares its epoch with all workers, which may be in another repeat
        rows.set_epoch(repeat + 1 if self.shuffle else 0)
        rows.load_state_dict(place)
        for batch in rows.iter(batch_size=1):  # in a worker, iter(rows) would yield a part of the rows
            row = {name: values[0] for name, values in batch.items()}
            try:
                example: Example | ExampleError = self._example(row)
            except ExampleError as error:
                example = error
            yield example, rows.state_dict()

    def _example(self, row: Mapping[str, Any]) -> Example:
        check_columns(row)
        return self.records.example(row)


def _loaded(
    path: str, data_files: str | Sequence[str] | None, split: str, streaming: bool, limits: Limits, called: str
) -> Any:
    """As `datasets.load_dataset`, within limits.

    Raises:
        ValueError: the files exceed the limits, are damaged, or lie outside of the folder that names them.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    files = data_files if data_files is None or isinstance(data_files, str) else list(data_files)
    try:
        builder: Any = datasets.load_dataset_builder(path, data_files=files)
    except FileNotFoundError as error:
        raise ValueError(f"{called}: {path} {files or ''} cannot be found: {error}") from error
    if builder.config.data_files is not None and not any(builder.config.data_files.values()):
        raise missing(called, str(files or path))
    if files is None and Path(path).is_dir():
        _check_inside(Path(path), builder.config.data_files or {})
    if isinstance(builder, datasets.ArrowBasedBuilder):
        builder._generate_tables = Bounded(builder, limits)  # pyright: ignore[reportAttributeAccessIssue]
    if streaming:
        return builder.as_streaming_dataset(split=split)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(f"cannot read {path} {files or ''}: {error.__cause__}") from error
        raise
    return builder.as_dataset(split=split)


def _check_inside(folder: Path, files: Mapping[Any, Sequence[str]]) -> None:
    """The README of a folder may name any data files, also addresses.

    Raises:
        ValueError: one of them is not in the folder.
    """
    for file in (str(file) for some in files.values() for file in some):
        if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
            raise ValueError(f"{folder} names the data file {file}, which is not in it: give data_files if it is meant")


def undecoded(rows: Any) -> Any:
    """A dataset of the `datasets` library that returns media as bytes or paths, and does not decode them."""
    features = rows.features or {}
    changed = {name: feature for name in features if (feature := _undecoded(features[name])) is not features[name]}
    for name, feature in changed.items():
        rows = rows.cast_column(name, feature)
    return rows


def _undecoded(feature: Any) -> Any:
    """A feature that decodes nothing; the same object if it decodes nothing already."""
    import datasets

    if "decode" in getattr(feature, "__dataclass_fields__", {}):  # Image, Video, Audio, Pdf and others
        return type(feature)(decode=False) if feature.decode else feature
    if isinstance(feature, datasets.List | datasets.LargeList):
        inner = _undecoded(feature.feature)
        return feature if inner is feature.feature else type(feature)(inner)
    if isinstance(feature, dict):
        inner = {name: _undecoded(given) for name, given in feature.items()}
        return feature if all(inner[name] is feature[name] for name in feature) else inner
    return feature


def _items(value: Any) -> list[Any]:
    """The items of a value of Arrow: of a list, its items; otherwise the value, or nothing. Bytes are not copied."""
    from pyarrow import types

    if not value.is_valid:
        return []
    return list(value.values) if types.is_nested(value.type) and not types.is_struct(value.type) else [value]


def _holds_bytes(item: Any) -> bool:
    from pyarrow import types

    if types.is_struct(item.type) and item.is_valid:
        return "bytes" in item and item["bytes"].is_valid
    return types.is_binary(item.type) or types.is_large_binary(item.type)
