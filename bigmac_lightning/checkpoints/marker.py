"""Whether a checkpoint is whole: all of its files are there, as they were written.

A directory has a marker, the file `complete.json`, which is written last: the size and the CRC-32 of every other file.
A directory of an earlier version has none; there the `.metadata` of torch's DCP tells how long each file must be. A
single file is a zip archive with checksums of its own. Nothing here reads what is in a checkpoint.
"""

import json
import os
import time
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigmac_lightning.checkpoints.remote import Place, RemotePath
from bigmac_lightning.checkpoints.safe import DCP_METADATA, Reader

MARKER = "complete.json"
FORMAT = "bigmac-checkpoint/1"
CHUNK = 1 << 22
"""Bytes that are read at once."""
AT_ONCE = 1000
"""Byte strings that are written at once. Linux takes 1024."""


@dataclass(frozen=True)
class Part:
    """A file of a checkpoint directory: its size in bytes and the CRC-32 of its contents."""

    size: int
    crc32: int | None = None  # not known, in a directory without a marker


@dataclass(frozen=True)
class Marker:
    """What the marker of a directory says.

    Attributes:
        step: the optimizer steps of the run when it was saved.
        world: the processes that wrote it.
        saved: the time when it was complete, in seconds since 1970.
        files: all other files, by name.
    """

    step: int
    world: int
    saved: float
    files: Mapping[str, Part]


def part_of(file: Place) -> Part:
    """What the marker says of a file."""
    size = crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return Part(size, crc)


def write_parts(file: Path, parts: Sequence[Any]) -> Part:
    """Write a file from byte strings, so that a crash of the machine does not lose it.

    Returns: what the marker says of it.
    """
    size = crc = 0
    with file.open("wb", buffering=0) as stream:
        for start in range(0, len(parts), AT_ONCE):
            some = parts[start : start + AT_ONCE]
            for part in some:
                size, crc = size + len(part), zlib.crc32(part, crc)
            _write(stream.fileno(), some)
        os.fsync(stream.fileno())
    return Part(size, crc)


def _write(file: int, parts: Sequence[Any]) -> None:
    """Write all parts with as few calls as can be: each holds Python's lock for a moment, on which a training waits."""
    left = [memoryview(part) for part in parts if len(part)]
    while left:
        written = os.writev(file, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


def write_marker(folder: Path, files: Mapping[str, Part], step: int, world: int) -> None:
    """Write the marker of a directory whose other files are complete."""
    marker = {"format": FORMAT, **asdict(Marker(step, world, time.time(), files))}
    with (folder / MARKER).open("w") as stream:
        json.dump(marker, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def marker_of(folder: Place) -> Marker | None:
    """The marker of a directory; ``None``: it has none.

    Raises:
        ValueError: it cannot be read.
    """
    if not (folder / MARKER).exists():
        return None
    try:
        entries: dict[str, Any] = json.loads((folder / MARKER).read_text())
        if entries.pop("format") != FORMAT:
            raise ValueError("it has another format")
        return Marker(**{**entries, "files": {name: Part(**part) for name, part in entries["files"].items()}})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MARKER} is damaged: {error}") from error


def problems(path: Place, contents: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Why a checkpoint, a directory or a file, is not whole; the list is empty if it is.

    Args:
        contents: whether to read the files and compare checksums, as well as sizes.
        share: (rank, ranks): look only at this rank's share of the files.
    """
    if not path.is_dir():
        return _problems_of_file(path, contents, share)
    try:
        marker = marker_of(path)
        files = marker.files if marker is not None else _files_of_metadata(path)
        own = {name: files[name] for name in sorted(files)[share[0] :: share[1]]}
        return problems_of_files(path, own, contents, exact=marker is not None)
    except unreadable(path) as error:
        return [str(error)]


def unreadable(path: Place) -> tuple[type[Exception], ...]:
    """The errors by which a checkpoint is known to be damaged. That a remote file system does not answer, or does not
    let this process read, says nothing of what is there."""
    return (ValueError, FileNotFoundError if isinstance(path, RemotePath) else OSError)


def problems_of_files(
    folder: Place, files: Mapping[str, Part], contents: bool = False, exact: bool = True
) -> list[str]:
    """Why files of a folder are not as they were written; the list is empty if they are.

    Args:
        contents: see `problems`.
        exact: whether their sizes are known, and not only what they are at least.
    """
    found = [_problem(folder / name, part, contents, exact) for name, part in files.items()]
    return [problem for problem in found if problem is not None]


def is_whole(path: Place) -> bool:
    """Whether something that a save has left is a complete checkpoint: a directory with its marker, or a file. Only
    sizes are looked at."""
    if path.is_dir():
        return (path / MARKER).exists() and not problems(path, contents=False)
    return path.is_file() and not problems(path, contents=False)


def saved_at(path: Place) -> float:
    """When a whole checkpoint was saved, in seconds since 1970."""
    marker = marker_of(path) if path.is_dir() else None
    if marker is not None:
        return marker.saved
    return (path / DCP_METADATA if path.is_dir() else path).stat().st_mtime


def _problem(file: Place, part: Part, contents: bool, exact: bool) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    size = file.stat().st_size
    if size != part.size if exact else size < part.size:
        least = "" if exact else "at least "
        return f"{file} has {size} bytes, but {least}{part.size} were written"
    if contents and part.crc32 is not None and (crc := part_of(file).crc32) != part.crc32:
        return f"{file} is damaged: its CRC-32 is {crc:08x}, but {part.crc32:08x} was written"
    return None


def _files_of_metadata(folder: Place) -> dict[str, Part]:
    """The files that DCP's metadata name, and how long each is at least."""
    if not (folder / DCP_METADATA).is_file():
        raise ValueError(f"{folder} is not a checkpoint directory: no such file {folder / DCP_METADATA}")
    ends: dict[str, int] = {}
    for place in Reader(folder).read_metadata().storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    return {name: Part(end) for name, end in ends.items()}


def _problems_of_file(path: Place, contents: bool, share: tuple[int, int]) -> list[str]:
    """Of a zip archive, as torch.save writes it. A file of any other kind is only known to be there."""
    if not path.is_file():
        return [f"{path} is missing"]
    if isinstance(path, RemotePath) and path.of_web:
        return []
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return []
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()[share[0] :: share[1]] if contents else []
            return _damaged(archive, members, path)
    except (zipfile.BadZipFile, NotImplementedError, *unreadable(path)) as error:
        size = path.stat().st_size
        return [f"{path} is cut off or damaged: its {size} bytes are not a whole archive ({error})"]


def _damaged(archive: zipfile.ZipFile, members: Collection[zipfile.ZipInfo], path: Place) -> list[str]:
    for member in members:
        try:
            with archive.open(member) as stream:
                while stream.read(CHUNK):
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            return [f"{path} is damaged: {error}"]
    return []
