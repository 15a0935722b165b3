"""Writes checkpoints in a thread while training goes on: one at a time, and no error is lost.

It knows nothing of what is written. All ranks start the same saves in the same order, and a save fails on all of them
or on none, as its functions raise on all ranks together (agreement.py).
"""

import threading
from collections.abc import Callable


class Background:
    """The save that is being written, if there is one."""

    def __init__(self) -> None:
        self._save: _Save | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write in a thread.

        Raises:
            Exception: the save before has failed, and nothing is written now.
        """
        self.wait()
        self._save = _Save(write)

    def after(self, function: Callable[[], None]) -> None:
        """Call a function once nothing is being written any more. If the save fails, the function is not called."""
        if self._save is None or not self._save.add(function):
            function()

    def wait(self) -> None:
        """Wait until nothing is being written any more.

        Raises:
            Exception: what has ended the save; it is raised once.
        """
        save, self._save = self._save, None
        if save is not None:
            save.wait()


class _Save:
    def __init__(self, write: Callable[[], None]) -> None:
        self._write, self._lock = write, threading.Lock()
        self._afterwards: list[Callable[[], None]] = []
        self._error: BaseException | None = None
        self._open = True
        # a daemon, so that a process that ends after an error does not wait for ranks that are gone
        self._thread = threading.Thread(target=self._run, name="bigmac checkpoint", daemon=True)
        self._thread.start()

    def add(self, function: Callable[[], None]) -> bool:
        """Whether the function will be called, or dropped after an error, here."""
        with self._lock:
            if self._open:
                self._afterwards.append(function)
            return self._open or self._error is not None

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._write()
            while (function := self._next()) is not None:
                function()
        except BaseException as caught:
            error = caught
        with self._lock:
            self._error, self._open = error, False

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            self._open = bool(self._afterwards)
            return self._afterwards.pop(0) if self._afterwards else None
