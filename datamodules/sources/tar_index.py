"""Where the members of tar files lie: flat arrays, which are made once, kept on disk, and mapped into memory by every
process. Ten million samples take a few hundred megabytes of disk, and next to nothing in a process.
"""

import hashlib
import os
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ..kept_arrays import made_once, of_texts, texts_of
from ..remote import is_remote
from .data_files import stamp
from .tar_headers import members_of

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
        with ThreadPoolExecutor() as threads:  # while one waits for a disk or a server, others go on
            made = threads.map(_File, paths)
            files = list(track(made, "index", len(paths), console=Console(stderr=True)) if shown else made)
        tars = np.cumsum([0, *(len(file.key_ends) for file in files)], dtype=np.int64)
        arrays = {"tars": tars, "keys": np.concatenate([file.keys for file in files])}
        for name, ends in (("key_starts", "key_ends"), ("members", "member_ends")):
            before = np.cumsum([0, *(int(getattr(file, ends)[-1]) if len(file.key_ends) else 0 for file in files)])
            found = [getattr(file, ends) + first for file, first in zip(files, before, strict=False)]
            arrays[name] = np.concatenate([np.zeros(1, np.int64), *found])
        names: dict[str, int] = {}
        numbers = [np.array([names.setdefault(name, len(names)) for name in file.names], np.int32) for file in files]
        arrays["suffixes"] = np.concatenate([own[file.suffixes] for own, file in zip(numbers, files, strict=True)])
        for name in ("offsets", "lengths"):
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
    """The columns of one tar: those of `TarIndex`, with ends instead of starts, and with suffixes of its own."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            ValueError: the file is no uncompressed tar.
            OSError: it cannot be read.
        """
        names, offsets, lengths, folders = _places(path)
        keys, endings = dict[bytes, int](), dict[bytes, int]()
        rows = list[tuple[int, int, int]]()  # numbers of a sample, of a suffix, and of a member
        for number, name in enumerate(names):
            if number in folders:
                continue
            start = name.rfind(b"/") + 1
            dot = name.find(b".", start)
            key, ending = (name, b"") if dot < 0 else (name[:dot], name[dot + 1 :])
            sample = keys.setdefault(key[1:] if start == 1 else key, len(keys))
            rows.append((sample, endings.setdefault(ending, len(endings)), number))
        suffixes = [f".{_text(ending)}" for ending in endings]
        self.names = sorted(suffixes)
        ranks = {suffix: rank for rank, suffix in enumerate(self.names)}
        samples, found, members = np.array(rows, np.int64).reshape(-1, 3).T
        self.suffixes = np.array([ranks[suffix] for suffix in suffixes], np.int32)[found]
        self.offsets, self.lengths = np.array(offsets, np.int64)[members], np.array(lengths, np.int64)[members]
        order = np.lexsort((self.lengths, self.offsets, self.suffixes, samples))
        self.suffixes, self.offsets, self.lengths = self.suffixes[order], self.offsets[order], self.lengths[order]
        self.keys = np.frombuffer(b"".join(keys), np.uint8)
        self.key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        self.member_ends = np.cumsum(np.bincount(samples, minlength=len(keys)), dtype=np.int64)


def _places(path: str) -> tuple[list[bytes], list[int], list[int], set[int]]:
    """The names of the members of a tar, where their contents begin, how many bytes they have, and which are folders. A
    link has the place of what it links to; what is no file of the tar is at -1.

    Raises:
        ValueError, OSError: see `_File`.
    """
    names, offsets, lengths = list[bytes](), list[int](), list[int]()
    odd: dict[int, tarfile.TarInfo] = {}
    try:
        for member in members_of(path):
            if isinstance(member, tarfile.TarInfo):
                odd[len(names)] = member
                name = member.name.encode("utf-8", "surrogateescape")
                file = member.isreg() and not member.issparse()
                offset, length = (member.offset_data, member.size) if file else (-1, 0)
            else:
                name, offset, length = member
            names.append(name)
            offsets.append(offset)
            lengths.append(length)
    except (tarfile.TarError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not an uncompressed tar: {error}") from error
    if links := [number for number, member in odd.items() if member.issym() or member.islnk()]:
        files = {posixpath.normpath(_text(name)): number for number, name in enumerate(names)}
        for number in links:
            if (found := _followed(number, odd, files)) is not None:
                offsets[number], lengths[number] = offsets[found], lengths[found]
    return names, offsets, lengths, {number for number, member in odd.items() if member.isdir()}


def _followed(number: int, odd: Mapping[int, tarfile.TarInfo], files: Mapping[str, int]) -> int | None:
    """The number of the member that a link leads to; ``None``: to none of the tar."""
    found: int | None = number
    for _ in range(MAX_LINKS):
        member = None if found is None else odd.get(found)
        if member is None or not (member.issym() or member.islnk()):
            return found
        folder = posixpath.dirname(member.name) if member.issym() else ""
        found = files.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
    return None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
