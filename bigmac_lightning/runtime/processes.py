"""Processes of a run, as others on the same machine see them. Linux only; elsewhere nothing is known of them."""

import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process.

    Attributes:
        host: the name of its machine.
        number: its number there.
        started: when it was started, in the words of the system; ``None`` if that is not known. With it, another
            process that has got the same number is not taken for this one.
    """

    host: str
    number: int
    started: str | None

    @classmethod
    def own(cls) -> "Process":
        """The process that asks."""
        return cls(socket.gethostname(), os.getpid(), (_stat(os.getpid()) or {}).get("started"))

    def __str__(self) -> str:
        return f"{self.host}, process {self.number}"

    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        if not self._is_here:
            return False
        stat = _stat(self.number)
        return stat is None or stat["started"] != self.started or stat["state"] in "ZX"

    def is_stopped(self) -> bool:
        """Whether it is known to be stopped."""
        stat = _stat(self.number) if self._is_here else None
        return stat is not None and stat["started"] == self.started and stat["state"] in "Tt"

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.number, signal.SIGKILL)

    @property
    def _is_here(self) -> bool:
        return self.started is not None and self.host == socket.gethostname()


def _stat(number: int) -> dict[str, str] | None:
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return {"state": fields[0], "started": fields[19]}
