"""How many samples the header of an MP4 or MOV file says that it has (ISO/IEC 14496-12).

A header of a few bytes may say that there are billions. FFmpeg makes an entry of its index for each when it opens a
file, and has no limit for that. Sound without compression has an entry for 1,024 samples.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

FIRST = (b"ftyp", b"moov", b"styp", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"pnot", b"uuid")
"""The boxes that may come first; FFmpeg takes a file for MP4 by them."""
FOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
"""The boxes in which others lie."""
READ = {b"hdlr": 12, b"stts": 16, b"stsz": 12, b"trun": 8, b"stsc": 1 << 20, b"stco": 8, b"co64": 8}
"""How many bytes are read of which box."""

PER_SAMPLE = 0xF00
"""Flags of a box "trun" that has bytes for each sample."""
SAMPLES_PER_BYTE = 64
"""More samples of sound than any codec puts into a byte."""


def check_samples(stream: BinaryIO) -> None:
    """Leaves the stream at its start. A file of another container passes.

    Raises:
        ValueError: there are more samples than fit into the file.
    """
    stream.seek(4)
    if stream.read(4) in FIRST:
        end = stream.seek(0, os.SEEK_END)
        total, track = 0, dict[bytes, bytes]()
        for kind, body in _boxes(stream, 0, end):
            if kind == b"trak":
                total, track = total + _bytes_of(track, end), {}
            elif kind == b"trun" and len(body) == READ[kind]:
                flags, count = struct.unpack(">II", body)
                total += 0 if flags & PER_SAMPLE else count
            else:
                track[kind] = body
        total += _bytes_of(track, end)
        if total > end:
            raise ValueError(f"it is damaged: its header lists {total:,} bytes of samples, and it has {end:,} bytes")
    stream.seek(0)


def _boxes(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """The kinds of boxes with the first bytes of their bodies, in the order of the file."""
    while start + 8 <= end:
        stream.seek(start)
        size, kind = struct.unpack(">I4s", stream.read(8))
        begin = start + 8
        if size == 1 and start + 16 <= end:
            size, begin = int.from_bytes(stream.read(8), "big"), start + 16
        stop = end if size == 0 else min(end, start + size)
        if stop < begin:
            return
        if kind in READ:
            yield kind, stream.read(min(READ[kind], stop - begin))
        elif kind in FOLDERS:
            yield kind, b""
            yield from _boxes(stream, begin, stop)
        start = stop


def _bytes_of(track: dict[bytes, bytes], end: int) -> int:
    """The least number of bytes of the samples of a track, if the header does not list each of them."""
    sizes, times, kind = (track.get(name, b"") for name in (b"stsz", b"stts", b"hdlr"))
    if kind[8:12] == b"soun" and times[4:8] == times[12:16] == b"\0\0\0\1":  # a sample is one number for each channel
        chunks = max(_number(track.get(name, b""), 4) for name in (b"stco", b"co64"))
        groups = track.get(b"stsc", b"")
        samples = chunks * max((_number(groups, at) for at in range(12, len(groups), 12)), default=0)
        return samples // SAMPLES_PER_BYTE
    return _number(sizes, 4) * _number(sizes, 8)


def _number(body: bytes, at: int) -> int:
    return int.from_bytes(body[at : at + 4], "big")
