"""Remote files, such as ``s3://bucket/000.tar``, through fsspec. A path with a protocol is a remote one."""

import io
import posixpath
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from bigmac_lightning.checkpoints.remote import file_system
from bigmac_lightning.file_part import FilePart

PROTOCOL = re.compile(r"(?!file:|local:)[a-z][a-z0-9+.-]*(://|::)")
WHOLE = 1 << 20
"""Bytes of a part of a file up to which it is fetched at once. Larger ones are read in blocks of so many bytes."""


def is_remote(path: Any) -> bool:
    return isinstance(path, str) and PROTOCOL.match(path) is not None


@dataclass(frozen=True)
class Folder:
    """A remote folder."""

    address: str

    def __str__(self) -> str:
        return self.address

    def resolve(self) -> "Folder":
        """Itself, as for a path without links."""
        return self

    def file(self, path: str) -> str:
        """The address of a file below it.

        Raises:
            ValueError: the path leads out of the folder.
        """
        below = posixpath.normpath(path)
        # "::" would name a place of another kind, and a server may take "%2e%2e" for ".."
        misread = "::" in path or (self.address.startswith("http") and set(path) & set("%?#\\"))
        if misread or posixpath.isabs(below) or below.partition("/")[0] == "..":
            raise ValueError(f"{path!r} leads out of {self.address}")
        return f"{self.address.rstrip('/')}/{below}"


def found(pattern: str, ending: str, called: str) -> list[str]:
    """The paths of files, sorted: of a pattern's matches, of a folder's files of this ending, or the path itself.

    Args:
        called: what the error calls the source.

    Raises:
        ValueError: the place cannot be asked.
    """
    try:
        system, path = file_system(pattern)
        if "*" in path or "?" in path or "[" in path:
            paths = system.glob(path)
        elif system.isfile(path):
            return [pattern]
        else:
            paths = system.glob(f"{path.rstrip('/')}/*{ending}")
        return sorted(map(system.unstrip_protocol, paths))
    except Exception as error:  # file systems raise errors of many libraries
        raise ValueError(f"{called}: {pattern} cannot be looked for: {type(error).__name__}: {error}") from error


def facts(paths: Sequence[str]) -> list[str]:
    """What changes when a file does: its size, and its time or checksum, as its place tells them.

    Raises:
        ValueError: a file cannot be found.
    """
    told: dict[tuple[str, str], str] = {}
    asked: set[tuple[str, str]] = set()
    found: list[str] = []
    for path in paths:
        try:
            system, inner = file_system(path)
            kind, folder = type(system).__name__, system._parent(inner)
            if (kind, folder) not in asked:  # one question for all files of a folder, if the place can answer it
                asked.add((kind, folder))
                with suppress(OSError, NotImplementedError):
                    entries = system.ls(folder, detail=True)
                    told |= {(kind, entry["name"]): _shown(entry) for entry in entries if entry.get("size")}
            found.append(told.get((kind, inner)) or _shown(system.info(inner)))
        except Exception as error:
            raise ValueError(f"{path} cannot be found: {type(error).__name__}: {error}") from error
    return found


def _shown(entry: dict[str, Any]) -> str:
    return repr(sorted((key, str(value)) for key, value in entry.items()))


def opened(path: str) -> BinaryIO:
    """A remote file, which is fetched in blocks as it is read."""
    system, inner = file_system(path)
    file = system.open(inner, "rb", block_size=WHOLE)
    return io.BufferedReader(FilePart(file, 0, file.size))


def part(path: str, offset: int, length: int) -> BinaryIO:
    """A range of bytes of a remote file.

    Raises:
        OSError: the file is shorter, or cannot be read.
    """
    if not length:
        return io.BytesIO()
    system, inner = file_system(path)
    if length > WHOLE:
        return io.BufferedReader(FilePart(system.open(inner, "rb", block_size=WHOLE), offset, length))
    content = system.cat_file(inner, start=offset, end=offset + length)
    if len(content) != length:
        raise OSError(f"{path} has {len(content)} bytes from {offset} on, and not {length}")
    return io.BytesIO(content)
