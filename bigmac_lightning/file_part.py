"""A part of a file, as a file that is not read into memory."""

import io
import os
from typing import Any


class FilePart(io.RawIOBase):
    """A range of bytes of a file, which is not read into memory."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        """
        Args:
            file: a binary one, unbuffered, that can be sought. It is closed with this one.
        """
        self._file = file
        self._offset, self._length, self._at = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        wanted = max(0, min(len(buffer), self._length - self._at))
        found = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._at += found
        return found

    def close(self) -> None:
        self._file.close()
        super().close()
