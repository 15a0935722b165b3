"""Where the members of tar files lie: flat arrays, which are made once, kept on disk, and mapped into memory by every
process. Ten million samples take a few hundred megabytes of disk, and next to nothing in a process.
"""

import fcntl
import hashlib
import json
import logging
import os
import posixpath
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from .data_files import stamp

FORMAT = 1
"""Version of kept indices."""
LARGE = 1 << 28
"""Bytes of tar files from which on their index is kept. That of others is made sooner than found."""
MAX_LINKS = 40
"""Most links that are followed from one to the next, as Linux does: more are taken for a circle."""

ARRAYS = ("tars", "keys", "key_starts", "members", "suffixes", "offsets", "lengths")
Member = tuple[str, int, int]
"""The suffix, offset and length of a member of a tar; (suffix, -1, 0): it is no file of the tar."""

log = logging.getLogger(__name__)


class TarIndex:
    """The samples of several tar files, in the order of the files and of their members.

    Attributes:
        paths: of the tar files.
        names: the suffixes that occur.
        arrays: "tars" (files + 1,), the number of the first sample of each file; "keys", the UTF-8 bytes of the keys of
            all samples, and "key_starts" (n + 1,), where each begins; "members" (n + 1,), the number of the first
            member of each sample; of each member "suffixes", its number in `names`, "offsets" and "lengths".
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        self.paths, self.names, self.arrays = list(paths), list(names), dict(arrays)

    @classmethod
    def of(cls, paths: Sequence[str], folder: Path) -> "TarIndex":
        """The index of tar files, from the folder if it is kept there.

        Raises:
            ValueError: a file is no uncompressed tar.
            OSError: a file cannot be read.
        """
        if sum(os.path.getsize(path) for path in paths) < LARGE:
            return cls.scanned(paths)
        place = folder / f"tars-{hashlib.sha256(f'{FORMAT} {stamp(paths)}'.encode()).hexdigest()[:32]}"
        if (kept := cls._kept(paths, place)) is not None:
            return kept
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = place.with_suffix(".lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes of a node, one makes the index, and the others wait
        except OSError as error:  # some file systems have no locks
            log.warning("The index of %s is not kept: %s", paths[0], error)
            return cls.scanned(paths, shown=True)
        with lock:
            if (kept := cls._kept(paths, place)) is not None:
                return kept
            made = cls.scanned(paths, shown=True)
            try:
                return made._keep(place)
            except OSError as error:
                log.warning("The index of %s is not kept: %s", paths[0], error)
                return made

    @classmethod
    def scanned(cls, paths: Sequence[str], shown: bool = False) -> "TarIndex":
        """The index of tar files, of which all headers are read.

        Args:
            shown: whether a bar shows the progress.
        """
        names: dict[str, int] = {}
        files = [
            _File.of(path, names) for path in (track(paths, "index", console=Console(stderr=True)) if shown else paths)
        ]
        tars = np.cumsum([0, *(len(file.key_ends) for file in files)], dtype=np.int64)
        arrays = {"tars": tars, "keys": np.concatenate([file.keys for file in files])}
        for name, ends in (("key_starts", "key_ends"), ("members", "member_ends")):
            before = np.cumsum([0, *(int(getattr(file, ends)[-1]) if len(file.key_ends) else 0 for file in files)])
            found = [getattr(file, ends) + first for file, first in zip(files, before, strict=False)]
            arrays[name] = np.concatenate([np.zeros(1, np.int64), *found])
        for name in ("suffixes", "offsets", "lengths"):
            arrays[name] = np.concatenate([getattr(file, name) for file in files])
        return cls(paths, list(names), arrays)

    @classmethod
    def _kept(cls, paths: Sequence[str], place: Path) -> "TarIndex | None":
        try:
            names = json.loads((place / "names.json").read_text("utf-8"))
            found = {name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
        except (OSError, ValueError):  # it is not there, or somebody has damaged it
            return None
        return _Mapped(paths, names, found, place)

    def _keep(self, place: Path) -> "TarIndex":
        """Write it; returns the one that is mapped from there."""
        new = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
        try:
            for name in ARRAYS:
                np.save(new / f"{name}.npy", self.arrays[name], allow_pickle=False)
            (new / "names.json").write_text(json.dumps(self.names), "utf-8")
            shutil.rmtree(place, ignore_errors=True)  # a damaged one
            new.rename(place)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        return self._kept(self.paths, place) or self

    def __len__(self) -> int:
        return len(self.arrays["key_starts"]) - 1

    def __getitem__(self, index: int) -> tuple[str, str, list[Member]]:
        """The path of the tar, the key, and the members of a sample, sorted by suffix."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        path = self.paths[int(np.searchsorted(self.arrays["tars"], index, side="right")) - 1]
        start, stop = self.arrays["key_starts"][index : index + 2]
        first, last = self.arrays["members"][index : index + 2]
        columns = (self.arrays[name][first:last].tolist() for name in ("suffixes", "offsets", "lengths"))
        members = [(self.names[suffix], offset, length) for suffix, offset, length in zip(*columns, strict=True)]
        return path, self.arrays["keys"][start:stop].tobytes().decode("utf-8", "surrogateescape"), members


class _Mapped(TarIndex):
    """An index that lies on disk. Workers map it as well, and it is not sent to them."""

    def __init__(
        self, paths: Sequence[str], names: Sequence[str], arrays: Mapping[str, np.ndarray], place: Path
    ) -> None:
        super().__init__(paths, names, arrays)
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.paths, self._place)


def _reopened(paths: Sequence[str], place: Path) -> TarIndex:
    return TarIndex._kept(paths, place) or TarIndex.of(paths, place.parent)


class _File:
    """The columns of one tar: those of `TarIndex`, with ends instead of starts."""

    def __init__(self, samples: Mapping[str, Sequence[Member]], names: dict[str, int]) -> None:
        keys = [key.encode("utf-8", "surrogateescape") for key in samples]
        members = [member for own in samples.values() for member in own]
        self.keys = np.frombuffer(b"".join(keys), np.uint8)
        self.key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        self.member_ends = np.cumsum([len(own) for own in samples.values()], dtype=np.int64)
        self.suffixes = np.array([names.setdefault(suffix, len(names)) for suffix, _, _ in members], np.int32)
        self.offsets = np.array([offset for _, offset, _ in members], np.int64)
        self.lengths = np.array([length for _, _, length in members], np.int64)

    @classmethod
    def of(cls, path: str, names: dict[str, int]) -> "_File":
        """
        Args:
            names: the numbers of suffixes that are known so far; further ones are added.
        """
        samples: dict[str, list[Member]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                found = list(_forward(tar))
                files = {posixpath.normpath(member.name): member for member in found}
                for member in found:
                    if not member.isdir():
                        folder, _, base = member.name.rpartition("/")
                        stem, _, suffix = base.partition(".")
                        key = f"{folder}/{stem}" if folder else stem
                        samples.setdefault(key, []).append((f".{suffix}", *_span(files, member)))
        except (tarfile.TarError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is not an uncompressed tar: {error}") from error
        return cls({key: sorted(members) for key, members in samples.items()}, names)


def _forward(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """
    Raises:
        TarError: a member does not come after the one before: its size is negative, and reading would never end.
    """
    end = -1
    while (member := tar.next()) is not None:
        if member.size < 0 or member.offset <= end:
            raise tarfile.ReadError(f"the header of {member.name!r} says that it has {member.size} bytes")
        end = member.offset
        yield member


def _span(files: Mapping[str, tarfile.TarInfo], member: tarfile.TarInfo) -> tuple[int, int]:
    """The offset and length of a member, or of the member that it links to; (-1, 0): the tar has no such file."""
    file: tarfile.TarInfo | None = member
    for _ in range(MAX_LINKS):
        if file is None or not (file.issym() or file.islnk()):
            break
        folder = posixpath.dirname(file.name) if file.issym() else ""
        file = files.get(posixpath.normpath(posixpath.join(folder, file.linkname)))
    return (file.offset_data, file.size) if file is not None and file.isreg() and not file.issparse() else (-1, 0)
