"""Where the members of a tar lie, by their headers.

Most members are plain: regular files, also after a long name of GNU tar or a pax header that says nothing of their
place. Their headers are read many at a time and checked as arrays. Python's `tarfile` reads all others, one by one, and
decides what is no tar; it takes about seven times as long.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np

from ..remote import WHOLE, is_remote, opened, part

BLOCK = tarfile.BLOCKSIZE
MANY = 4096
"""Most members that are checked together, and that `tarfile` reads before plain ones are looked for again."""
LEAST, LEAST_REMOTE = 1 << 12, 1 << 17
"""Bytes that are read at once where members are large, of files on disk and of remote ones."""
REGULAR, PAX, LONG = (tarfile.AREGTYPE, tarfile.REGTYPE), tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME
NUMBERS = ((100, 108), (108, 116), (116, 124), (124, 136), (136, 148), (148, 156), (329, 337), (337, 345))
"""The spans of a header's numbers: mode, owner, group, size, time, checksum, and two of devices."""
MAY_BE_BINARY = (108, 116, 136)
"""Where those begin that may have other than octal digits in a plain header: owner, group and time."""
RECORD = re.compile(rb"(\d{1,9}) (path|[amc]time|[ug]id|[ug]name)=")

Plain = tuple[bytes, int, int]
"""The name of a member, where its content begins, and how many bytes it has."""


def members_of(path: str) -> Iterator[Plain | tarfile.TarInfo]:
    """The members of a tar, in their order, as `tarfile` finds them.

    Raises:
        TarError: the file is no uncompressed tar; or a member's size is negative, and reading would never end.
        OSError: it cannot be read.
    """
    with ExitStack() as stack:
        file = stack.enter_context(opened(path) if is_remote(path) else open(path, "rb"))  # noqa: SIM115
        tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
        window, end, turns = _Window.of(path, file), -1, 1
        while True:
            for _ in range(turns):
                if (member := tar.next()) is None:
                    return
                if member.size < 0 or member.offset <= end:
                    raise tarfile.ReadError(f"the header of {member.name!r} says that it has {member.size} bytes")
                end = member.offset
                yield member
            turns = min(2 * turns, MANY)
            while _names_are_bytes(tar) and (found := window.plain(tar.offset)):
                yield from found[0]
                end, tar.offset, turns = found[1] - 1, found[1], 1


def _names_are_bytes(tar: tarfile.TarFile) -> bool:
    """Whether `tarfile` decodes names as UTF-8, and no pax header for all members changes what theirs say."""
    return tar.encoding == "utf-8" and tar.errors == "surrogateescape" and tar.pax_headers.keys() <= {"comment"}


class _Window:
    """A part of a file, which moves on. Its size follows the distance of headers."""

    def __init__(self, read: Callable[[int, int], bytes], least: int) -> None:
        """
        Args:
            read: gets a position and a number of bytes, and returns these bytes, or fewer at the end of the file.
            least: bytes that are read at once.
        """
        self._read, self._least = read, least
        self._length, self._start, self._block = least, 0, b""

    @classmethod
    def of(cls, path: str, file: object) -> "_Window":
        """
        Args:
            file: the open file at the path.
        """
        if is_remote(path):
            size = file.seek(0, os.SEEK_END)  # pyright: ignore[reportAttributeAccessIssue]
            file.seek(0)  # pyright: ignore[reportAttributeAccessIssue]
            return cls(lambda at, length: part(path, at, max(0, min(length, size - at))).read(), LEAST_REMOTE)
        number = file.fileno()  # pyright: ignore[reportAttributeAccessIssue]
        return cls(lambda at, length: os.pread(number, length, at), LEAST)

    def plain(self, start: int) -> tuple[list[Plain], int] | None:
        """The plain members whose headers follow each other from a position on, and where the header after them is.
        There may be more of them there. ``None``: the member there is not plain."""
        members, headers, heads, ends = list[Plain](), list[bytes](), list[int](), list[int]()
        at = start
        while len(members) < MANY:
            header, name, content = self._bytes(at, BLOCK), b"", at + BLOCK
            if len(header) < BLOCK:
                break
            kind = header[156:157]
            if kind in (PAX, LONG):
                length = _blocks(_size(header))
                body = self._bytes(at, length + 2 * BLOCK) if 0 < length <= WHOLE else b""
                found = _long_name(kind, body[BLOCK:-BLOCK]) if body and len(body) == length + 2 * BLOCK else None
                if found is None:
                    break
                headers.append(header)
                header, name, content = body[-BLOCK:], found, at + len(body)
            own, size = header[:100].partition(b"\0")[0], _size(header)
            if header[156:157] not in REGULAR or not own or own.endswith(b"/") or size < 0:
                break
            if not name:
                name = header[345:500].partition(b"\0")[0] + b"/" + own if header[345] else own
            members.append((name, content, size))
            headers.append(header)
            heads.append(len(headers))
            ends.append(at := content + _blocks(size))
        if not members:
            return None
        whole = int(np.searchsorted(heads, _first_wrong(headers), side="right"))
        return (members[:whole], ends[whole - 1]) if whole else None

    def _bytes(self, at: int, length: int) -> bytes:
        """A range of bytes of the file; fewer where it ends."""
        here = at - self._start
        if here < 0 or here + length > len(self._block):
            near = 0 <= here < 2 * self._length
            self._length = min(2 * self._length, WHOLE) if near else max(self._length // 2, self._least)
            self._start, here = at, 0
            self._block = self._read(at, max(self._length, length))
        return self._block[here : here + length]


def _size(header: bytes) -> int:
    """The size that a header tells; negative: it is not told in octal digits."""
    try:
        return int(header[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def _blocks(size: int) -> int:
    """The bytes of the blocks of a member."""
    return -(-size // BLOCK) * BLOCK


def _long_name(kind: bytes, body: bytes) -> bytes | None:
    """The name that an extended header gives the next member; "": none. ``None``: it may say more than that."""
    if kind == LONG:
        name = body.partition(b"\0")[0]
        return None if not name or name.endswith(b"/") else name
    records, name, at = body.rstrip(b"\0"), b"", 0
    while at < len(records):
        found = RECORD.match(records, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(records) or records[end - 1 : end] != b"\n":
            return None
        if found[2] == b"path":
            name = records[found.end() : end - 1]
            if not name or name.endswith(b"/"):
                return None
        at = end
    return None if b"hdrcharset" in records else name


def _first_wrong(headers: list[bytes]) -> int:
    """The number of the first header of a list that `tarfile` might read in another way; or how many there are."""
    rows = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    right = np.ones(len(rows), bool)
    for first, last in NUMBERS:
        field = rows[:, first:last]
        digit, blank = (field & 0xF8) == ord("0"), (field == 0) | (field == ord(" "))
        octal = (digit | blank).all(1) & ~(blank[:, :-1] & digit[:, 1:]).any(1)  # digits, and then blanks
        right &= octal | (field[:, 0] == 0x80) if first in MAY_BE_BINARY else octal
    told, checksum = np.zeros(len(rows), np.int64), rows[:, 148:156]
    for column in checksum.T:
        told = np.where((column & 0xF8) == ord("0"), told * 8 + (column & 7), told)
    counted = rows.sum(1, dtype=np.int64) - checksum.sum(1, dtype=np.int64) + 8 * ord(" ")
    return int(np.argmin([*(right & (told == counted)), False]))
