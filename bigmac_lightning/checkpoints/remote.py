"""Places in remote file systems, such as ``s3://bucket/run``, through fsspec."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, _is_object_storage

MADE_A_PATH = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")
BLOCK = 1 << 23
"""Bytes that are read ahead."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A place in a remote file system, which can be asked what a `pathlib.Path` is asked here.

    Every question goes to the file system, as other processes write there, too. Only the answer that there is nothing
    makes a method return ``False`` or nothing: if the file system cannot be asked, its error is raised.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "RemotePath":
        if not is_name(name):
            raise ValueError(f"{name!r} is not the name of a file in {self}")
        return RemotePath(f"{self.address}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.address).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.address).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.address).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder around it; of a bucket, the bucket itself."""
        around = self.address.rpartition("/")[0]
        return RemotePath(around) if len(around) > self.address.index("://") + 2 else self

    @property
    def parents(self) -> list["RemotePath"]:
        return [] if self.parent == self else [self.parent, *self.parent.parents]

    @property
    def of_web(self) -> bool:
        """Whether it is an address of a web server, which need not tell what is in a folder or send part of a file."""
        return self.address.startswith("http")

    def absolute(self) -> "RemotePath":
        return self

    def resolve(self) -> "RemotePath":
        return self

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> "Stat":
        if (info := self._info()) is None:
            raise FileNotFoundError(f"there is no {self}")
        return Stat(self, info["size"])

    def modified(self) -> float:
        """When it was written, in seconds since 1970."""
        system, inner = self._system()
        return system.modified(inner).timestamp()

    def iterdir(self) -> Iterator["RemotePath"]:
        """What is in a folder, by name; nothing, if there is no such folder."""
        system, inner = self._system()
        entries: list[str] = []
        with suppress(FileNotFoundError, NotADirectoryError):
            entries = system.ls(inner, detail=False)
        names = {entry.rstrip("/").rpartition("/")[2] for entry in entries if entry.rstrip("/") != inner.rstrip("/")}
        yield from (self / name for name in sorted(names) if is_name(name))

    def open(self, mode: str = "rb") -> Any:
        system, inner = self._system()
        return system.open(inner, mode, block_size=BLOCK)

    def read_bytes(self) -> bytes:
        system, inner = self._system()
        return system.cat_file(inner)

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def upload(self, file: Path) -> None:
        """Write a copy of a local file. An object store has it as a whole or not at all."""
        system, inner = self._system()
        if not _is_object_storage(system):  # for which this would make the bucket
            system.makedirs(system._parent(inner), exist_ok=True)
        system.put_file(str(file), inner)

    def unlink(self) -> None:
        """Delete a file, if it is there."""
        system, inner = self._system()
        with suppress(FileNotFoundError):
            system.rm_file(inner)

    def rmdir(self) -> None:
        """Delete an empty folder, if there is such a thing in this file system."""
        system, inner = self._system()
        if not _is_object_storage(system):
            with suppress(OSError, NotImplementedError):
                system.rmdir(inner)

    def _info(self) -> dict[str, Any] | None:
        system, inner = self._system()
        with suppress(FileNotFoundError, NotADirectoryError):
            return system.info(inner)
        return None

    def _system(self) -> tuple[Any, str]:
        system, inner = file_system(self.address)
        system.invalidate_cache()
        return system, inner


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the place in it.

    Raises:
        ImportError: it needs a package that is not installed.
        ValueError: there is no such file system.
    """
    try:
        return url_to_fs(address)
    except ImportError as error:
        known = known_implementations.get(address.partition(":")[0], {})
        package = known.get("class", "fsspec").partition(".")[0]
        told = str(error).rstrip(".") if package == "fsspec" else f"its package is missing: pip install {package}"
        raise ImportError(f"{address} cannot be reached: {told}") from error


@dataclass(frozen=True)
class Stat:
    """What is known of a file."""

    place: RemotePath
    st_size: int

    @property
    def st_mtime(self) -> float:
        return self.place.modified()


Place = Path | RemotePath


def at(path: str | Place) -> Place:
    """The place that a path or an address names.

    Raises:
        ValueError: the address is of several file systems, or was made a `Path`.
    """
    if isinstance(path, RemotePath):
        return path
    address = str(path)
    if MADE_A_PATH.match(address):
        raise ValueError(f"{address} was an address, of which a Path has dropped a slash: give it as a text")
    if _is_local_file_protocol(address):
        return Path(path)
    if "::" in address:
        raise ValueError(f"{address} goes through several file systems ('::'): give the address in the last one alone")
    return RemotePath(address if address.endswith("://") else address.rstrip("/"))


def is_name(name: str) -> bool:
    """Whether a text names a file in a folder, and cannot lead to another place."""
    return name not in ("", ".", "..") and "::" not in name and not set("/\\") & set(name)
