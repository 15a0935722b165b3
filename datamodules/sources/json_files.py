"""Sources that are JSON files: one record per line, or a list of records. records.py makes examples of the records."""

import codecs
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import ExampleError
from ..example import Example
from ..files import Roots, roots_of
from ..limits import Limits
from ..remote import is_remote
from .data_files import stamp
from .records import DESCRIBE, Records
from .source import Source

TOO_DEEP = "has objects or lists that are nested too deep to be read"
PIECE = 1 << 24
"""Bytes of a line that are read at once."""


class JSONSource(Source):
    """A source of one data file, with media below one or several folders."""

    def __init__(
        self,
        path: str | Path,
        media_root: Roots | None = None,
        ignore: Sequence[str] = (),
        prompt: str = DESCRIBE,
        limits: Limits = Limits(),
    ) -> None:
        """
        Args:
            path: of the data file.
            media_root: the folder of its media, or several folders, see `Roots`; ``None``: the folder of the data file.
            ignore: keys of records that are left out; other keys that are not known are refused.
            prompt: the user's words for records that are only a caption.
            limits: what its examples may have at most.
        """
        if is_remote(path):
            raise ValueError(
                f"{type(self).__name__}: {path} is remote, which only WebDatasetTars and HFStream can read"
            )
        self.path, self.limits = Path(path), limits
        self.media_roots = roots_of(self.path.parent if media_root is None else media_root)
        self.records = Records(self.media_roots, tuple(ignore), prompt)
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Find the records of the file."""

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self) -> str:
        return stamp([self.path])

    def identity(self) -> str:
        return repr((type(self).__qualname__, str(self.path.resolve()), self.records.identity()))


class MessagesJSONL(JSONSource):
    """One JSON object per line, as ms-swift, LLaMA-Factory, OpenAI and TRL read them. `Records` lists all keys::

        {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A cat."}],
         "images": ["cats/1.png"], "videos": [], "target": null}

    ``<image>`` and ``<video>`` stand for the next entry of `images` and `videos`, which are paths below the media root,
    ``data:`` URIs, or objects with "path", "height" and "width". `target`, if given, is an image that a generator
    learns to make. Texts for pretraining are ``{"text": "..."}``, or ``{"prompt": "...", "completion": "..."}``.
    """

    def _open(self) -> None:
        starts, numbers, start = [], [], 0
        with open(self.path, "rb") as file:
            for number, (line, length) in enumerate(_lines(file), start=1):
                if text := line.removeprefix(codecs.BOM_UTF8).strip():
                    if not starts and text[:1] == b"[" and text[-1:] != b"]":
                        raise ValueError(f"{self.path} is a JSON list, and not an object per line: use LlavaJSON")
                    starts.append((start, length))
                    numbers.append(number)
                start += length
        self._spans, self._numbers = np.array(starts, dtype=np.int64).reshape(-1, 2), np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        start, length = self._spans[index].tolist()
        where = f"line {self._numbers[index]}"
        self.limits.check_record(length, f"({where})")
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(length)
        try:
            record = json.loads(line.decode("utf-8-sig"))
            return self._read(record, where)
        except UnicodeDecodeError as error:
            raise ExampleError(f"({where}) is not valid UTF-8: {error}") from error
        except ExampleError as error:
            raise ExampleError(f"({where}) {error}") from error
        except RecursionError as error:
            raise ExampleError(f"({where}) {TOO_DEEP}") from error
        except ValueError as error:  # also of numbers with too many digits
            raise ExampleError(f"({where}) is not JSON: {error}") from error

    def _read(self, record: Any, name: str) -> Example:
        return self.records.example(record, name)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The lines of a file, each with its length. Of a line that is longer than `PIECE`, only the first piece that is
    not blank is in memory."""
    while line := file.readline(PIECE):
        length, piece = len(line), line
        while len(piece) == PIECE and not piece.endswith(b"\n"):
            piece = file.readline(PIECE)
            length, line = length + len(piece), line if line.strip() else piece
        yield line, length


class LlavaJSON(JSONSource):
    """A JSON list of records, as LLaVA and LLaMA-Factory have them. `Records` lists all keys::

        [{"id": "1", "image": "cats/1.png", "conversations": [
            {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

    The whole file is read at once. `MessagesJSONL` keeps only where its lines begin, so it suits large files better.
    """

    def _open(self) -> None:
        try:
            records = json.loads(self.path.read_text("utf-8-sig"))
        except RecursionError as error:
            raise ValueError(f"{self.path} {TOO_DEEP}") from error
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not JSON in UTF-8: {error}. If it is an object per line, use MessagesJSONL"
            ) from error
        if not isinstance(records, list):
            raise ValueError(f"{self.path} must be a JSON list of objects with conversations")
        self._records: list[Any] = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return self.records.example(self._records[index])
