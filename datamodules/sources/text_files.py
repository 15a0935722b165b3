"""A source of plain text files, for pretraining."""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import ExampleError
from ..example import Example
from .data_files import matching, name_of_all, stamp
from .source import Source


class TextFiles(Source):
    """Texts to which no template is applied. All of each text is learnt, and the tokenizer's end token after it."""

    def __init__(self, paths: str | Sequence[str], separator: str | None = None) -> None:
        """
        Args:
            paths: of files in UTF-8, or a pattern such as ``books/*.txt``.
            separator: the string between the texts of a file, such as a blank line; ``None``: a file is one text. Blank
                texts between separators are left out.
        """
        if separator == "":
            raise ValueError("separator is empty: give the string between texts, or None if a file is one text")
        self.paths, self.separator = matching(paths, "TextFiles"), separator
        spans = [(i, *span) for i, path in enumerate(self.paths) for span in _spans(Path(path).read_bytes(), separator)]
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
        with open(self.paths[which], "rb") as file:
            file.seek(start)
            content = file.read(length)
        try:
            return Example.of_text(content.decode("utf-8"), name=name)
        except UnicodeDecodeError as error:
            raise ExampleError(f"({name}) is not valid UTF-8: {error}") from error


def _spans(content: bytes, separator: str | None) -> Iterator[tuple[int, int]]:
    """The first byte and the length of each text of a file."""
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    between = None if separator is None else separator.encode()
    for text in [content[start:]] if between is None else content[start:].split(between):
        if text.strip() or between is None:
            yield start, len(text)
        start += len(text) + len(between or b"")
