"""Remote files, such as ``s3://bucket/000.tar``, through fsspec. A path with a protocol is a remote one."""

import io
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from bigmac_lightning.file_part import FilePart

PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*(://|::)")
WHOLE = 1 << 20
"""Bytes of a part of a file up to which it is fetched at once. Larger ones are read in blocks of so many bytes."""


def is_remote(path: Any) -> bool:
    return isinstance(path, str) and PROTOCOL.match(path) is not None


def found(pattern: str, ending: str, called: str) -> list[str]:
    """The paths of files, sorted: of a pattern's matches, of a folder's files of this ending, or the path itself.

    Args:
        called: what the error calls the source.

    Raises:
        ValueError: the place cannot be asked.
    """
    try:
        system, path = url_to_fs(pattern)
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
            system, inner = url_to_fs(path)
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
    """A remote file; only what is read of it is fetched, and a little more."""
    system, inner = url_to_fs(path)
    return system.open(inner, "rb", block_size=WHOLE)


def part(path: str, offset: int, length: int) -> BinaryIO:
    """A range of bytes of a remote file.

    Raises:
        OSError: the file is shorter, or cannot be read.
    """
    if not length:
        return io.BytesIO()
    if length > WHOLE:
        return io.BufferedReader(FilePart(opened(path), offset, length))
    system, inner = url_to_fs(path)
    content = system.cat_file(inner, start=offset, end=offset + length)
    if len(content) != length:
        raise OSError(f"{path} has {len(content)} bytes from {offset} on, and not {length}")
    return io.BytesIO(content)
