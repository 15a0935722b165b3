"""What a source of examples is. To train on data of your own, derive from `Source`.

Knows nothing of tokenizers, models or ranks; ready-made sources are in json_files.py, tars.py and others.
"""

import hashlib
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from ..example import Example


class Source(Dataset, ABC):
    """Examples by number. Every rank of a pipeline asks for an example: reading one opens no media files."""

    @property
    def name(self) -> str:
        """What errors and logs call it."""
        return type(self).__name__

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """
        Raises:
            ExampleError: what is there cannot be read as an example.
        """

    def origin(self, index: int) -> int:
        """The number of an example that errors give: that in the data, where this source has some of them."""
        return index

    def fingerprint(self) -> str | None:
        """Changes whenever the data does, so that what was measured in an earlier run can be used again.

        ``None`` (the default): measure in every run.
        """
        return None

    def identity(self) -> str:
        """Tells sources apart on disk: its class, and all that it was made from."""
        state = pickle.dumps((type(self).__qualname__, len(self), self.__dict__))
        return hashlib.sha256(state).hexdigest()


def stamp(paths: "list[str | Path]") -> str:
    """Names, sizes and times of files, as a fingerprint; one may be missing, as where a link leads nowhere."""
    stats = [(str(path), found.st_size, found.st_mtime_ns) for path in paths if (found := _stat(path))]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def resolved(roots: Sequence[Path]) -> list[str]:
    """What tells folders apart from others on disk."""
    return [str(folder.resolve()) for folder in roots]


def _stat(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
