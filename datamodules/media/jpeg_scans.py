"""The scans of a JPEG. Each of them costs the time to decode the whole image, and may take a few bytes only."""

import re

from ..errors import ExampleError
from ..files import File

MAX_SCANS = 100
"""Most scans of a JPEG. Encoders write about 10."""

MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""A marker between pixels: the other bytes that may follow 0xFF belong to the pixels."""
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9


def check_scans(file: File) -> None:
    """
    Raises:
        ExampleError: it has too many scans.
    """
    with file.open() as stream:
        content = stream.read()
    if (
        content.count(bytes([0xFF, START_OF_SCAN])) <= MAX_SCANS
    ):  # nearly always, and quick: pixels never have 0xFF 0xDA
        return
    scans, place = 0, 2  # an image within the header, say, has some too
    while found := MARKER.search(content, place):
        kind, place = content[found.start(1)], found.end()
        if kind == END_OF_IMAGE:
            return
        scans += kind == START_OF_SCAN
        if scans > MAX_SCANS:
            raise ExampleError(f"{file.name} has more than {MAX_SCANS} scans, each of which is decoded: save it anew")
        place += int.from_bytes(content[place : place + 2], "big")
