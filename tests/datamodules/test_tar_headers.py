"""Members of tars, as `tarfile` finds them: odd ones, damaged ones, and plain ones that it need not read."""

import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules.sources.tar_headers import NUMBERS, members_of
from bigmac_lightning.datamodules.sources.tar_index import TarIndex

ODD = (
    *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.AREGTYPE),
    *(tarfile.GNUTYPE_SPARSE, b"Z"),
)
FIELDS = (*NUMBERS, (0, 100), (156, 157), (345, 500))
VALUES = (
    *(
        b"",
        b" " * 12,
        b"7" * 7,
        b"0o17",
        b"1_0",
        b"-5",
        b"+5",
        b"12 3",
        b"12\x004444",
        b" 12",
        b"\x80\0\0\0\0\0\0\0\0\0\0\x09",
    ),
    *(b"\xff" * 12, b"0" * 11, b"a/", b"x", b"L", b"K", b"g", b"5", b"\0"),
)
"""What fields of a header are replaced by."""


def _name(draw: random.Random) -> str:
    def part() -> str:
        return "".join(draw.choices("abä日.x_-\udcff", [9] * 8 + [1], k=draw.choice([1, 2, 5, 5, 30, 60])))

    name = "/".join(part() for _ in range(draw.choice([1, 1, 1, 2, 3, 5])))
    name = draw.choice(["/", "./", *[""] * 20]) + name + draw.choice(["/", *[""] * 40])
    return name + draw.choice([".jpg", ".txt", ".seg.png", "", ""])


def _members(draw: random.Random, pax: bool) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    odd, names = draw.choice([0, 0, 0.02, 0.3, 1]), list[str]()
    times = draw.choice([0, 0.5])  # a fraction makes a pax header
    for _ in range(draw.choice([0, 1, 5, 20, 100])):
        member = tarfile.TarInfo(draw.choice([_name(draw), *(f"{name.partition('.')[0]}.json" for name in names[-1:])]))
        member.mtime = 1_000_000 + times
        member.uid = draw.choice([1000] * 20 + [3_000_000])
        member.uname = draw.choice(["root", "ünder"])
        content = b""
        if draw.random() < odd:
            member.type = draw.choice(ODD)
            member.linkname = draw.choice([*names, "nowhere", "../a"])
        if member.type in (tarfile.REGTYPE, tarfile.CONTTYPE, tarfile.AREGTYPE):
            content = draw.randbytes(draw.choice([0, 1, 100, 511, 512, 513, 1000, 5000, 100_000]))
        member.size = len(content)
        if pax and draw.random() < 0.05:
            key = draw.choice(["SCHILY.x", "path", "size", "GNU.sparse.name", "comment", "hdrcharset"])
            member.pax_headers = {key: draw.choice(["1", "a/b", "ä" * 100, "700", "9 hdrcharset=BINARY\n"])}
        names.append(member.name)
        yield member, content


def _write(path: Path, draw: random.Random) -> bytes:
    kind = draw.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    of_all = draw.choice([None] * 6 + [{"comment": "x"}, {"path": "all"}, {"mtime": "1.5"}])
    with tarfile.open(path, "w", format=kind, pax_headers=of_all) as tar:
        for member, content in _members(draw, kind == tarfile.PAX_FORMAT):
            try:
                tar.addfile(member, io.BytesIO(content) if content else None)
            except ValueError:  # a name or a number is too long for this format
                continue
    return path.read_bytes()


def _damaged(whole: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return whole[: draw.randrange(len(whole))]
    at = draw.choice([at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"] or [0])
    header = bytearray(whole[at : at + 512])
    first, last = draw.choice(FIELDS)
    header[first:last] = draw.choice(VALUES)[: last - first].ljust(last - first, b"\0")
    if draw.random() < 0.7:
        told = draw.choice([b"%06o\0 ", b"%07o\0", b"%07o "]) % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
        header[148:156] = told
    return whole[:at] + bytes(header) + whole[at + 512 :]


def _shown(name: str, member: tarfile.TarInfo) -> Any:
    if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return name.encode("utf-8", "surrogateescape"), member.offset_data, member.size
    return name, member.type, member.linkname, member.offset_data, member.size


def _found(path: Path) -> Any:
    try:
        return [_shown(m.name, m) if isinstance(m, tarfile.TarInfo) else m for m in members_of(str(path))]
    except (tarfile.TarError, OverflowError) as error:
        return repr(error)


def _expected(path: Path) -> Any:
    """What Python's own library finds, one member after another."""
    found = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:
                    return repr(
                        tarfile.ReadError(f"the header of {member.name!r} says that it has {member.size} bytes")
                    )
                found.append(_shown(member.name, member))
    except (tarfile.TarError, OverflowError) as error:
        return repr(error)
    return found


def test_against_tarfile(tmp_path: Path) -> None:
    path, errors = tmp_path / "a.tar", 0
    for seed in range(120):
        draw = random.Random(seed)
        whole = _write(path, draw)
        assert _found(path) == _expected(path), seed
        for number in range(4):
            path.write_bytes(_damaged(whole, draw))
            found = _found(path)
            assert found == _expected(path), (seed, number)
            errors += isinstance(found, str)
    assert errors > 50


@pytest.mark.parametrize("kind", ["plain", "long names", "times", "long names in pax headers", "large"])
def test_plain_members_are_not_read_one_by_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, asked = 300, []
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT if kind == "long names" else tarfile.PAX_FORMAT
    ) as tar:
        for i in range(number):
            member = tarfile.TarInfo(f"{'d' * (200 if 'long' in kind else 5)}/{i:03}.txt")
            member.size, member.mtime = 9000 if kind == "large" else 5, 0.5 if kind == "times" else 0
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    own = tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda tar: asked.append(tar) or own(tar))
    index = TarIndex.of([str(tmp_path / "a.tar")], tmp_path)
    assert [index[i][1][-3:] for i in range(number)] == [f"{i:03}" for i in range(number)]
    assert len(asked) < 5
