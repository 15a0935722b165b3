"""Plain text files for pretraining. Knows bytes; knows nothing of tokens."""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..example import Example, ExampleError
from .source import Source, stamp


class TextFiles(Source):
    """Texts without a template, all of which are learnt, with the tokenizer's end token behind each."""

    def __init__(self, paths: str | Sequence[str], separator: str | None = None) -> None:
        """
        Args:
            paths: of files in UTF-8, or a pattern such as ``books/*.txt``.
            separator: between the texts of a file, such as a blank line; ``None``: a file is one text. A blank text
                between two separators is none.
        """
        if isinstance(paths, str):
            pattern = Path(paths)
            paths = sorted(str(path) for path in pattern.parent.glob(pattern.name))
        if not paths:
            raise ValueError("TextFiles: there are no such files")
        if separator == "":
            raise ValueError("separator is empty: give what stands between texts, or None where a file is one text")
        self.paths, self.separator = list(paths), separator
        spans = [(i, *span) for i, path in enumerate(self.paths) for span in _spans(Path(path).read_bytes(), separator)]
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 3)

    @property
    def name(self) -> str:
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"

    def __len__(self) -> int:
        return len(self._spans)

    def fingerprint(self) -> str:
        return stamp(list(self.paths))

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
    """First byte and length of each text of a file."""
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    between = None if separator is None else separator.encode()
    for text in [content[start:]] if between is None else content[start:].split(between):
        if text.strip() or between is None:
            yield start, len(text)
        start += len(text) + len(between or b"")
