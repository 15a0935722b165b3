"""Lets builders of the `datasets` library read files in pieces of limited size, and stop where files grow too much.

A few bytes of Parquet may stand for many: values that repeat are stored once. So it is computed from the header how
many rows can be read at once.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..limits import Limits, MiB

AT_ONCE = 256 * MiB
"""Bytes of the rows of Parquet that are read at once, if a file's header is right; a single row may have more."""

PLAIN = {"PLAIN", "RLE", "BIT_PACKED", "BYTE_STREAM_SPLIT"}
"""Encodings of Parquet that store each text or byte string in full. (Levels and booleans are stored as RLE.)"""

WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}


class Bounded:
    """Takes the place of a builder's method that makes tables.

    Args:
        builder: a builder of `datasets` that makes tables of Arrow.
        limits: those of the source.
    """

    def __init__(self, builder: Any, limits: Limits) -> None:
        self.builder, self.limits, self.generate = builder, limits, builder._generate_tables
        files = [str(file) for some in (builder.config.data_files or {}).values() for file in some]
        self.size = sum(map(os.path.getsize, files)) if all(map(os.path.isfile, files)) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, Any]]:
        """
        Raises:
            ValueError: the tables have grown too much.
        """
        most = None if self.size is None else max(self.limits.always_allowed, self.limits.growth * self.size)
        total = 0
        for key, table in self._tables(*args, **kwargs):
            total += table.nbytes
            self._check(total, most)
            yield key, table

    def _tables(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, Any]]:
        if type(self.builder).__name__ != "Parquet" or "files" not in kwargs or "row_groups_list" not in kwargs:
            yield from self.generate(*args, **kwargs)
            return
        most = max(self.limits.always_allowed, self.limits.growth * (self.size or 0))
        for number, (file, groups) in enumerate(zip(kwargs["files"], kwargs["row_groups_list"], strict=True)):
            rows, least = rows_at_once(file, groups)
            self._check(least, most)
            self.builder.config.batch_size = rows
            for key, table in self.generate(files=[file], row_groups_list=[groups]):
                yield replace(key, original_shard_id=number), table

    def _check(self, total: int, most: int | None) -> None:
        if most is not None and total > most:
            raise ValueError(
                f"the data files have grown to {total:,} bytes by decompression; the most is {most:,}: "
                f"limits.growth={self.limits.growth} times their size, or limits.always_allowed. If it is meant, raise "
                "one of them"
            )


def rows_at_once(file: Any, groups: tuple[int, ...] | None) -> tuple[int, int]:
    """How many rows of a file of Parquet can be read at once, and how many bytes its numbers have at least.

    Args:
        file: the path.
        groups: the row groups that are read; ``None``: all.
    """
    import pyarrow.parquet

    with open(file, "rb") as stream:
        metadata = pyarrow.parquet.ParquetFile(stream).metadata
    rows, numbers = 1, 0
    fewest: int | None = None
    for g in groups if groups is not None else range(metadata.num_row_groups):
        group = metadata.row_group(g)
        expanding = 0
        for c in range(group.num_columns):
            column = group.column(c)
            width = WIDTHS.get(column.physical_type)
            if width is not None:
                numbers += width * column.num_values
                expanding += width
            elif not set(column.encodings) <= PLAIN:
                expanding += column.total_uncompressed_size
            else:
                expanding += column.total_uncompressed_size // max(1, group.num_rows)
        rows = max(rows, group.num_rows)
        fits = max(1, AT_ONCE // max(1, expanding))
        fewest = fits if fewest is None else min(fewest, fits)
    return min(rows, fewest or 1), numbers
