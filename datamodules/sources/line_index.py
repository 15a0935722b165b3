"""Where the lines of a file lie: arrays, which are kept if the file is large, and mapped by every process."""

import codecs
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import opened
from ..kept_arrays import Arrays, made_once
from ..remote import is_remote
from .data_files import stamp

FORMAT = 1
"""Version of kept indices."""
LARGE = 1 << 28
"""Bytes of a file from which on its index is kept. That of others is made sooner than found."""
PIECE = 1 << 24
"""Bytes of a line that are read at once."""


class LineIndex:
    """The lines of a file that are not blank.

    Attributes:
        spans: (n, 2) the first byte and the length of each.
        numbers: (n,) which line of the file each is, from 1 on.
    """

    def __init__(self, path: str | Path, folder: Path) -> None:
        """
        Args:
            path: of the file, which may be remote.
            folder: where the index is kept, if the file is large or remote.

        Raises:
            ValueError: the file is a JSON list.
        """
        self._path, self._folder = path, folder
        self._is_kept = is_remote(path) or os.path.getsize(path) >= LARGE
        arrays = self._found() if self._is_kept else _scanned(path)
        self.spans, self.numbers = arrays["spans"], arrays["numbers"]

    def __len__(self) -> int:
        return len(self.numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers map a kept index as well, and it is not sent to them."""
        if self._is_kept:
            return type(self), (self._path, self._folder)
        return super().__reduce__()  # pyright: ignore[reportReturnType]

    def _found(self) -> Arrays:
        name = hashlib.sha256(f"{FORMAT} {stamp([self._path])}".encode()).hexdigest()[:32]
        place = self._folder / f"lines-{name}.safetensors"
        return made_once(
            place, ("spans", "numbers"), lambda: _scanned(self._path), f"The places of lines in {self._path}"
        )


def _scanned(path: str | Path) -> Arrays:
    starts, numbers, start = [], [], 0
    with opened(path) as file:
        for number, (line, length) in enumerate(_lines(file), start=1):
            if text := line.removeprefix(codecs.BOM_UTF8).strip():
                if not starts and text[:1] == b"[" and text[-1:] != b"]":
                    raise ValueError(f"{path} is a JSON list, and not an object per line: use LlavaJSON")
                starts.append((start, length))
                numbers.append(number)
            start += length
    return {"spans": np.array(starts, np.int64).reshape(-1, 2), "numbers": np.array(numbers, np.int64)}


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The lines of a file, each with its length. Of a line that is longer than `PIECE`, only the first piece that is
    not blank is in memory."""
    while line := file.readline(PIECE):
        length, piece = len(line), line
        while len(piece) == PIECE and not piece.endswith(b"\n"):
            piece = file.readline(PIECE)
            length, line = length + len(piece), line if line.strip() else piece
        yield line, length
