"""Where the members of tar files lie: flat arrays, which are made once, kept on disk, and mapped into memory by every
process. Ten million samples take a few hundred megabytes of disk, and next to nothing in a process.
"""

import hashlib
import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ..kept_arrays import made_once, of_texts, texts_of
from ..remote import is_remote, opened
from .data_files import stamp

FORMAT = 2
"""Version of kept indices."""
LARGE = 1 << 28
"""Bytes of tar files from which on their index is kept. That of others is made sooner than found."""
MAX_LINKS = 40
"""Most links that are followed from one to the next, as Linux does: more are taken for a circle."""

ARRAYS = ("names", "name_ends", "tars", "keys", "key_starts", "members", "suffixes", "offsets", "lengths")
Member = tuple[str, int, int]
"""The suffix, offset and length of a member of a tar; (suffix, -1, 0): it is no file of the tar."""


class TarIndex:
    """The samples of several tar files, in the order of the files and of their members.

    Attributes:
        paths: of the tar files.
        names: the suffixes that occur.
        arrays: "names" and "name_ends", see `of_texts`; "tars" (files + 1,), the number of the first sample of each
            file; "keys", the UTF-8 bytes of the keys of all samples, and "key_starts" (n + 1,), where each begins;
            "members" (n + 1,), the number of the first member of each sample; of each member "suffixes", its number in
            `names`, "offsets" and "lengths".
    """

    def __init__(self, paths: Sequence[str], arrays: Mapping[str, np.ndarray], place: Path | None = None) -> None:
        """
        Args:
            place: the file in which the arrays are kept, if they are. Workers open it, and the arrays are not sent.
        """
        self.paths, self.arrays, self._place = list(paths), dict(arrays), place
        self.names = texts_of(self.arrays["names"], self.arrays["name_ends"])

    def __reduce__(self) -> tuple[Any, ...]:
        if self._place is not None and self._place.exists():  # otherwise it could not be kept
            return type(self).of, (self.paths, self._place.parent)
        return type(self), (self.paths, self.arrays)

    @classmethod
    def of(cls, paths: Sequence[str], folder: Path) -> "TarIndex":
        """The index of tar files, from the folder if it is kept there.

        Raises:
            ValueError: a file is no uncompressed tar.
            OSError: a file cannot be read.
        """
        if not any(map(is_remote, paths)) and sum(os.path.getsize(path) for path in paths) < LARGE:
            return cls(paths, cls.scanned(paths))
        place = folder / f"tars-{hashlib.sha256(f'{FORMAT} {stamp(paths)}'.encode()).hexdigest()[:32]}.safetensors"
        made = made_once(place, ARRAYS, lambda: cls.scanned(paths, shown=True), f"The places of samples in {paths[0]}")
        return cls(paths, made, place)

    @classmethod
    def scanned(cls, paths: Sequence[str], shown: bool = False) -> dict[str, np.ndarray]:
        """The arrays of the index of tar files, of which all headers are read.

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
        arrays["names"], arrays["name_ends"] = of_texts(list(names))
        return arrays

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
            with (
                opened(path) if is_remote(path) else open(path, "rb") as file,
                tarfile.open(fileobj=file, mode="r:") as tar,
            ):
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
