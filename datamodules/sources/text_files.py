"""A source of plain text files, for pretraining."""

import codecs
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import ExampleError
from ..example import Example
from ..limits import Limits
from ..remote import is_remote
from .data_files import matching, name_of_all, stamp
from .source import Source

NOT_BLANK = re.compile(rb"\S")


class TextFiles(Source):
    """Texts to which no template is applied. All of each text is learnt, and the tokenizer's end token after it."""

    def __init__(
        self,
        paths: str | Sequence[str],
        separator: str | None = None,
        link_roots: Sequence[str] = (),
        limits: Limits = Limits(),
    ) -> None:
        """
        Args:
            paths: of files in UTF-8, or a pattern such as ``books/*.txt``.
            separator: the string between the texts of a file, such as a blank line; ``None``: a file is one text. Blank
                texts between separators are left out.
            link_roots: folders into which matches of a pattern may be links, besides the pattern's own folder.
            limits: what its examples may have at most.
        """
        if separator == "":
            raise ValueError("separator is empty: give the string between texts, or None if a file is one text")
        if any(map(is_remote, [paths] if isinstance(paths, str) else paths)):
            raise ValueError(f"TextFiles: {paths} is remote, which only WebDatasetTars and HFStream can read")
        self.paths, self.separator, self.limits = matching(paths, "TextFiles", link_roots, ".txt"), separator, limits
        spans = [(i, *span) for i, path in enumerate(self.paths) for span in _spans_of(path, separator)]
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3)

    @property
    def name(self) -> str:
        return name_of_all(self.paths)

    def __len__(self) -> int:
        return len(self._spans)

    def fingerprint(self) -> str:
        return stamp(self.paths)

    def identity(self) -> str:
        return repr((type(self).__qualname__, [str(Path(path).resolve()) for path in self.paths], self.separator))

    def __getitem__(self, index: int) -> Example:
        which, start, length = self._spans[index].tolist()
        name = self.paths[which] if self.separator is None else f"{self.paths[which]}, from byte {start}"
        self.limits.check_record(length, f"({name}) the text")
        with open(self.paths[which], "rb") as file:
            file.seek(start)
            content = file.read(length)
        try:
            return Example.of_text(content.decode("utf-8"), name=name)
        except UnicodeDecodeError as error:
            raise ExampleError(f"({name}) is not valid UTF-8: {error}") from error


def _spans_of(path: str, separator: str | None) -> list[tuple[int, int]]:
    """The first byte and the length of each text of a file, which is not read into memory."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return [(0, 0)] if separator is None else []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0
            if separator is None:
                return [(start, size - start)]
            return list(_spans(content, start, size, separator.encode()))


def _spans(content: mmap.mmap, start: int, size: int, between: bytes) -> Iterator[tuple[int, int]]:
    while start <= size:
        end = content.find(between, start)
        end = size if end < 0 else end
        if NOT_BLANK.search(content, start, end):
            yield start, end - start
        start = end + len(between)
