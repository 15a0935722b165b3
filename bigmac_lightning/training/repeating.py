"""Writes the tensors of a checkpoint directory once more, as torch's DCP would, if only their numbers have changed.

DCP plans each save anew, and packs each tensor into a zip archive of its own. That takes about 0.4 ms per tensor, in
which it holds Python's lock, so a training beside it waits. A run saves the same tensors again and again. So what lies
between the numbers in this rank's files is remembered, and only the numbers and their checksums are replaced. The bytes
are those that DCP would write, but for a number by which torch tells one call of `torch.save` from another in its logs.
"""

import pickle
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from bigmac_lightning.checkpoints.marker import Part, write_parts
from bigmac_lightning.checkpoints.safe import DCP_METADATA, Reader
from bigmac_lightning.file_part import FilePart
from bigmac_lightning.training.copying import Copied, Leaves, bytes_of, kind_of

LOCAL_HEADER, DIRECTORY_ENTRY, DESCRIPTOR = 30, 46, 8
"""Bytes of parts of a zip archive: a file's header and its entry in the directory, without names; and bit 3 of a file's
flags, which says that its CRC-32 follows it. From the format's specification, APPNOTE.TXT of PKWARE."""


class _UnfamiliarError(Exception):
    """A file does not look as expected, so it cannot be written again."""


@dataclass(frozen=True)
class _Slot:
    """An archive of one tensor.

    Attributes:
        path: the tensor's path.
        before, after: the bytes before and after its numbers.
        checksums: where in `after` the CRC-32 of the numbers stands.
    """

    path: tuple[Any, ...]
    before: bytes
    after: bytes
    checksums: tuple[int, ...]

    def parts(self, numbers: Any) -> tuple[bytes, Any, bytearray]:
        after = bytearray(self.after)
        checksum = zlib.crc32(numbers)
        for place in self.checksums:
            struct.pack_into("<I", after, place, checksum)
        return self.before, numbers, after


class Repeating:
    """How this rank's tensors were written last."""

    def __init__(self) -> None:
        self._kinds: list[Any] | None = None
        self._last: ReferenceType[Copied] | None = None
        self._files: dict[str, list[_Slot]] = {}
        self._metadata = b""

    def fits(self, tensors: Leaves) -> bool:
        """Whether tensors differ from the last ones in their numbers only, as far as this rank knows."""
        if self._last is not None and self._last() is tensors:
            return True
        return self._kinds is not None and self._kinds == _kinds(tensors)

    def write(self, place: Path, tensors: Leaves, rank: int) -> dict[str, Part]:
        """Write the tensors into a directory. Every rank does, and they fit on every rank.

        Returns: what the marker says of the files, by name.
        """
        place.mkdir(parents=True, exist_ok=True)
        written = {DCP_METADATA: write_parts(place / DCP_METADATA, [self._metadata])} if rank == 0 else {}
        for name, slots in self._files.items():
            raw = tensors.raw if isinstance(tensors, Copied) else {s.path: bytes_of(tensors[s.path]) for s in slots}
            written[name] = write_parts(place / name, [part for slot in slots for part in slot.parts(raw[slot.path])])
        return written

    def remember(self, place: Path, tensors: Leaves, rank: int) -> None:
        """Remember what all ranks have just written into a directory. What looks unfamiliar is forgotten."""
        self._kinds = self._last = None
        with suppress(_UnfamiliarError, OSError, ValueError, struct.error, zipfile.BadZipFile):
            metadata = Reader(place).read_metadata()
            metadata.storage_meta = None  # it names the path of the save
            paths, files = metadata.planner_data or {}, dict[str, list[Any]]()
            for index, info in metadata.storage_data.items():
                if info.relative_path.startswith(f"__{rank}_"):
                    files.setdefault(info.relative_path, []).append((info.offset, info.length, paths.get(index.fqn)))
            self._files = {name: _slots(place / name, entries, tensors) for name, entries in files.items()}
            self._metadata = pickle.dumps(metadata) if rank == 0 else b""
            self._kinds = _kinds(tensors)
            self._last = ref(tensors) if isinstance(tensors, Copied) else None


def _kinds(tensors: Leaves) -> list[Any]:
    return [(path, kind_of(value)) for path, value in tensors.items()]


def _slots(file: Path, entries: list[Any], tensors: Leaves) -> list[_Slot]:
    found, position = list[_Slot](), 0
    for offset, length, path in sorted(entries, key=lambda entry: entry[0]):
        if offset != position or not isinstance(tensors.get(path), Tensor):
            raise _UnfamiliarError(file)
        with FilePart(file.open("rb", 0), offset, length) as archive:
            found.append(_slot(path, archive, tensors[path]))
        position += length
    if position != file.stat().st_size:
        raise _UnfamiliarError(file)
    return found


def _slot(path: tuple[Any, ...], archive: FilePart, tensor: Any) -> _Slot:
    """What the archive of a tensor is like. Its numbers are not read, as they may be many."""
    with zipfile.ZipFile(archive) as known:  # pyright: ignore[reportArgumentType]
        place, entry, files = known.start_dir, 0, known.infolist()  # pyright: ignore[reportAttributeAccessIssue]
    data = [file for file in files if file.filename.endswith("/data/0")]
    for file in files:
        if file in data:
            entry = place
        names = _between(archive, place + 28, place + 34)  # lengths of its name, extra and comment
        place += DIRECTORY_ENTRY + sum(struct.unpack("<HHH", names))
    if len(data) != 1 or not data[0].flag_bits & DESCRIPTOR or data[0].compress_type != zipfile.ZIP_STORED:
        raise _UnfamiliarError(path)
    header, numbers = data[0].header_offset, bytes_of(tensor)
    start = header + LOCAL_HEADER + sum(struct.unpack("<HH", _between(archive, header + 26, header + 30)))
    end = start + data[0].file_size
    after, checksums = _between(archive, end, None), (4, entry + 16 - end)  # the first follows a signature
    stored = [struct.unpack_from("<I", after, checksum)[0] for checksum in checksums]
    if len(numbers) != data[0].file_size or stored != [zlib.crc32(numbers)] * 2:
        raise _UnfamiliarError(path)
    return _Slot(path, _between(archive, 0, start), after, checksums)


def _between(archive: FilePart, start: int, end: int | None) -> bytes:
    archive.seek(start)
    return archive.read(-1 if end is None else end - start)
