"""Sources that are JSON files: one record per line, or a list of records. records.py makes examples of the records."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ExampleError
from ..example import Example
from ..files import File, Roots, folders_of, opened
from ..limits import Limits
from ..remote import facts, is_remote
from .data_files import check_file, stamp
from .line_index import LineIndex
from .records import DESCRIBE, Records
from .source import Source

TOO_DEEP = "has objects or lists that are nested too deep to be read"


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
            path: of the data file, which may be remote (``s3://bucket/a.jsonl``).
            media_root: the folder of its media, or several folders, see `Roots`; ``None``: the folder of the data file.
            ignore: keys of records that are left out; other keys that are not known are refused.
            prompt: the user's words for records that are only a caption.
            limits: what its examples may have at most.
        """
        self.path, self.limits = path if is_remote(path) else Path(path), limits
        check_file(path, type(self).__name__)
        if is_remote(path):
            facts([str(path)])
        folder = str(path).rpartition("/")[0] if is_remote(path) else Path(path).parent
        self.media_roots = folders_of(folder if media_root is None else media_root, "media_root")
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
        path = self.path if isinstance(self.path, str) else self.path.resolve()
        return repr((type(self).__qualname__, str(path), self.records.identity()))


class MessagesJSONL(JSONSource):
    """One JSON object per line, as ms-swift, LLaMA-Factory, OpenAI and TRL read them. `Records` lists all keys::

        {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A cat."}],
         "images": ["cats/1.png"], "videos": [], "target": null}

    ``<image>`` and ``<video>`` stand for the next entry of `images` and `videos`, which are paths below the media root,
    ``data:`` URIs, or objects with "path", "height" and "width". `target`, if given, is an image that a generator
    learns to make. Texts for pretraining are ``{"text": "..."}``, or ``{"prompt": "...", "completion": "..."}``.
    """

    def __init__(self, *args: Any, index_dir: str | Path = "~/.cache/bigmac_lightning", **kwargs: Any) -> None:
        """
        Args:
            args, kwargs: see `JSONSource`.
            index_dir: folder in which it is kept where the lines of a large or remote file lie, so that only the first
                run reads all of it before training.
        """
        self._index_dir = Path(index_dir).expanduser()
        super().__init__(*args, **kwargs)

    def _open(self) -> None:
        self._lines = LineIndex(self.path, self._index_dir)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        start, length = self._lines.spans[index].tolist()
        where = f"line {self._lines.numbers[index]}"
        self.limits.check_record(length, f"({where})")
        with File.inside(self.path, where, start, length).open() as file:
            line = file.read()
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


class LlavaJSON(JSONSource):
    """A JSON list of records, as LLaVA and LLaMA-Factory have them. `Records` lists all keys::

        [{"id": "1", "image": "cats/1.png", "conversations": [
            {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

    The whole file is read at once. `MessagesJSONL` keeps only where its lines begin, so it suits large files better.
    """

    def _open(self) -> None:
        try:
            with opened(self.path) as file:
                records = json.loads(file.read().decode("utf-8-sig"))
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
