"""A source of plain text files, for pretraining."""

import codecs
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import ExampleError
from ..example import Example
from ..files import File, opened
from ..kept_arrays import made_once
from ..limits import Limits
from ..remote import is_remote
from .data_files import matching, name_of_all, stamp
from .source import Source

NOT_BLANK = re.compile(rb"\S")
PIECE = 1 << 24
"""Bytes of a file that are read at once."""
FORMAT = 1
"""Version of kept places."""


class TextFiles(Source):
    """Texts to which no template is applied. All of each text is learnt, and the tokenizer's end token after it."""

    def __init__(
        self,
        paths: str | Sequence[str],
        separator: str | None = None,
        link_roots: Sequence[str] = (),
        limits: Limits = Limits(),
        index_dir: str | Path = "~/.cache/bigmac_lightning",
    ) -> None:
        """
        Args:
            paths: of files in UTF-8, or a pattern such as ``books/*.txt``. They may be remote (``s3://bucket/*.txt``).
            separator: the string between the texts of a file, such as a blank line; ``None``: a file is one text. Blank
                texts between separators are left out.
            link_roots: folders into which matches of a pattern may be links, besides the pattern's own folder.
            limits: what its examples may have at most.
            index_dir: folder in which it is kept where the texts of remote files lie, so that only the first run reads
                all of them before training.
        """
        if separator == "":
            raise ValueError("separator is empty: give the string between texts, or None if a file is one text")
        self.paths, self.separator, self.limits = matching(paths, "TextFiles", link_roots, ".txt"), separator, limits
        self._spans = self._kept(Path(index_dir).expanduser()) if any(map(is_remote, self.paths)) else self._found()

    def _found(self) -> np.ndarray:
        """(n, 3) the number of the file of each text, its first byte, and its length."""
        spans = [(i, *span) for i, path in enumerate(self.paths) for span in _spans_of(path, self.separator)]
        return np.array(spans, dtype=np.int64).reshape(-1, 3)

    def _kept(self, folder: Path) -> np.ndarray:
        """The same, from the folder if it is kept there."""
        name = hashlib.sha256(f"{FORMAT} {self.separator!r} {stamp(self.paths)}".encode()).hexdigest()[:32]
        place, what = folder / f"texts-{name}.safetensors", f"The places of texts in {self.name}"
        return made_once(place, ("spans",), lambda: {"spans": self._found()}, what)["spans"]

    @property
    def name(self) -> str:
        return name_of_all(self.paths)

    def __len__(self) -> int:
        return len(self._spans)

    def fingerprint(self) -> str:
        return stamp(self.paths)

    def identity(self) -> str:
        places = [path if is_remote(path) else str(Path(path).resolve()) for path in self.paths]
        return repr((type(self).__qualname__, places, self.separator))

    def __getitem__(self, index: int) -> Example:
        which, start, length = self._spans[index].tolist()
        name = self.paths[which] if self.separator is None else f"{self.paths[which]}, from byte {start}"
        self.limits.check_record(length, f"({name}) the text")
        with File.inside(self.paths[which], name, start, length).open() as file:
            content = file.read()
        try:
            return Example.of_text(content.decode("utf-8"), name=name)
        except UnicodeDecodeError as error:
            raise ExampleError(f"({name}) is not valid UTF-8: {error}") from error


def _spans_of(path: str, separator: str | None) -> list[tuple[int, int]]:
    """The first byte and the length of each text of a file, which is not read into memory."""
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        if separator is None:
            return [(start, size - start)]
        file.seek(start)
        return list(_spans(file, start, separator.encode()))


def _spans(file: BinaryIO, start: int, between: bytes) -> Iterator[tuple[int, int]]:
    """The texts between separators, from a place on, at which the file is."""
    rest, at, blank = b"", start, True  # `rest` begins at the byte `at`; whether the text was blank so far
    while piece := file.read(PIECE):
        content, done = rest + piece, 0
        while (end := content.find(between, done)) >= 0:
            if not blank or NOT_BLANK.search(content, done, end):
                yield start, at + end - start
            done, blank = end + len(between), True
            start = at + done
        kept = max(done, len(content) - len(between) + 1)  # a separator may begin in what is kept
        blank = blank and not NOT_BLANK.search(content, done, kept)
        rest, at = content[kept:], at + kept
    if not blank or NOT_BLANK.search(rest):
        yield start, at + len(rest) - start
