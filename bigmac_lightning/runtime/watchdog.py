"""Ends a process whose run does not go on, and says why.

Each process has a thread that looks at what the process is doing, posts it on the board, and reads there whether the
run must end. A process may hang in a way in which no thread of Python runs: then a timer in C, which this thread winds
up again and again, prints the stacks and ends it. A process that is stopped as a whole runs neither: the others see
that it posts nothing any more. So each process also looks at the next one, if that is on its machine: one that has
ended without a word ends the run, and one that is stopped is killed when the run ends.
"""

import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypedDict

from bigmac_lightning.runtime.board import ANSWERS_WITHIN, Board
from bigmac_lightning.runtime.flight_record import keep_flight_record
from bigmac_lightning.runtime.processes import Process
from bigmac_lightning.runtime.progress import Progress

STDERR = 2
"""The file of errors by its number: `sys.stderr` may be none in a notebook, and may be locked."""

LONGEST_INTERVAL = 2.0
"""Seconds between two looks."""

TO_LOOK = ANSWERS_WITHIN + 1
"""Seconds that a look may take before the timer in C ends the process."""

TO_END_BY_ITSELF = 5.0
"""Seconds that a process has to end by itself after another one has failed."""

TO_MEET = 0.3
"""Seconds in which several processes may find a hang at the same time."""

TO_REPORT = 3.0
"""Seconds that the process which has found a hang has to say what all processes are doing, beyond its looks."""

TO_SAVE = 70.0
"""Seconds that a process has to end after an error of its own: enough to find out whether all can save a checkpoint."""


class End(TypedDict):
    """Why a run ends.

    Attributes:
        rank: the rank that has failed or hangs.
        how: "failed" or "hangs".
        why: what it has said of it.
    """

    rank: int
    how: str
    why: str


class Watchdog:
    """Watches over this process of a run.

    Attributes:
        in_loops: whether it is in the loops of training or evaluation; elsewhere, downloads and the like may take long.

    Args:
        board: where processes post what they are doing.
        rank, world_size: global rank of this process, and number of processes.
        progress: what this process is doing.
        patience: seconds after which a process that does nothing new hangs; ``None``: it never does.
        longest: seconds after which a process in which no thread of Python runs hangs outside of loops, too; ``None``:
            it never does.
        hear: is called in the thread at each look.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        world_size: int,
        progress: Progress,
        patience: float | None,
        longest: float | None = None,
        hear: Callable[[], None] = lambda: None,
    ) -> None:
        self._board, self._rank, self._world_size, self._progress = board, rank, world_size, progress
        self._patience, self._longest, self._hear = patience, longest, hear
        self._interval = LONGEST_INTERVAL if patience is None else min(LONGEST_INTERVAL, patience / 5)
        self.in_loops = False
        self._looks = 0
        self._lost: float | None = None  # since when the board does not answer
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._failed: float | None = None
        self._thread = threading.Thread(target=self._run, name="bigmac watchdog", daemon=True)
        self._own, self._next = Process.own(), None

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def enter_loops(self) -> None:
        """The loops begin. Look at once, as what holds elsewhere must not hold until the next look."""
        self.in_loops = True
        self._wake.set()

    def stop(self) -> None:
        """Watch no more, as the run is over here. Other processes may go on for a while, and must not take the end of
        this one for a failure."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._try_to(lambda: self._post(ends=True))

    def fail(self, why: str, perhaps_of: float = 0.0) -> End | None:
        """Tell all processes that this one has failed, so that none waits for it.

        Args:
            perhaps_of: seconds in which another process may say that it has failed before, as this may be why.

        Returns: why the run ends, if another process has said so.
        """
        self._failed = self._failed or time.monotonic()
        end = self._ending(perhaps_of) or self._end_all("failed", why)
        self._kill_stopped()
        return None if end is None or end["rank"] == self._rank else end

    def _ending(self, within: float) -> End | None:
        """Why the run ends, if another process has said so, or says so within these seconds; else ``None``."""
        deadline = time.monotonic() + within
        while True:
            try:
                note = self._board.read("end")
            except Exception:
                return None
            if note is not None and note["rank"] != self._rank:
                return note
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        seen: Any = None
        since = time.monotonic()
        while not self._stopping.is_set():
            patience = self._patience if self.in_loops else None
            self._wind_up(patience if self.in_loops else self._longest)
            if self._progress.beats != seen or patience is None:
                seen, since = self._progress.beats, time.monotonic()
            note = self._look()
            now = time.monotonic()
            if note is None and self._next is not None and self._next.has_ended():
                self._end_all("failed", "its process has ended without a word", (self._rank + 1) % self._world_size)
            if self._failed is not None:
                if now - self._failed > TO_SAVE:
                    self._end("has failed, and could not end by itself")
            elif note is not None:
                self._obey(note)
            elif self.in_loops and self._lost is not None and now - self._lost > 2 * TO_END_BY_ITSELF:
                self._end("ends: the process that the store of the run belongs to has ended or does not answer")
            elif patience is not None and now - since > patience:
                self._report(now - since)
            self._wake.wait(self._interval)
            self._wake.clear()

    def _wind_up(self, seconds: float | None) -> None:
        """Let the timer in C end this process unless it is wound up again within these seconds."""
        if seconds is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(seconds + self._interval + TO_LOOK, exit=True, file=STDERR)

    def _look(self) -> Any:
        """Post what this process is doing; return the note by which the run ends, if there is one."""
        try:
            self._post()
            self._hear()
            note = self._board.read("end")
            following = self._board.read(f"status/{(self._rank + 1) % self._world_size}")
            if following is not None:
                self._next = None if following["ends"] else Process(*following["process"])
            self._lost = None
        except Exception:
            self._lost = self._lost or time.monotonic()
            return None
        return note

    def _post(self, ends: bool = False) -> None:
        self._looks += 1
        progress = self._progress
        status = {
            "process": self._own,
            "look": self._looks,
            "ends": ends,
            "doing": progress.describe(),
            "for": time.monotonic() - progress.since,
            "waits": progress.waiting is not None or progress.together,
            "done": None if progress.done is None else str(progress.done.action),
        }
        self._board.post(f"status/{self._rank}", status)

    def _obey(self, note: End) -> None:
        """End this process, as another one has said that the run ends."""
        self._wind_up(TO_SAVE)
        if note["how"] == "failed":  # perhaps this one fails, too, and says why
            deadline = time.monotonic() + TO_END_BY_ITSELF
            while time.monotonic() < deadline and not self._stopping.is_set() and self._failed is None:
                time.sleep(0.05)
            if self._stopping.is_set() or self._failed is not None:
                return
            self._end(f"ends, as rank {note['rank']} has failed: {note['why']}")
        self._try_to(lambda: self._post(ends=True))
        self._say(f"rank {self._rank}: {self._what()}")
        # A launcher ends all processes when the first one has ended, so the one that says what all do must come to it.
        deadline = time.monotonic() + 3 * self._interval + TO_REPORT
        while time.monotonic() < deadline and not self._try_to(lambda: self._board.read("reported")):
            time.sleep(0.1)
        self._end(f"ends, as rank {note['rank']} {note['why']}", stacks=True)

    def _report(self, seconds: float) -> None:
        """Say what every process is doing, and end this one."""
        self._wind_up(TO_SAVE)
        why = f"has done nothing new for {seconds:.0f} s"
        self._end_all("hangs", why)
        self._try_to(lambda: self._post(ends=True))
        time.sleep(TO_MEET)
        note = self._try_to(lambda: self._board.read("end"))
        if note is not None and note["rank"] != self._rank:  # another one has found it at the same time
            self._obey(note)
            return
        before = self._statuses()
        time.sleep(2.5 * self._interval)
        after = self._statuses()
        silent = [
            rank
            for rank, status in after.items()
            if rank != self._rank and not status["ends"] and status["look"] == before.get(rank, status)["look"]
        ]
        unknown = [rank for rank in range(self._world_size) if rank not in after]
        busy = [rank for rank, status in after.items() if not status["waits"] and rank not in silent]
        lines = [f"The run hangs: rank {self._rank} {why}."]
        if self._next is not None and self._next.is_stopped():
            lines.append(f"Rank {(self._rank + 1) % self._world_size} ({self._next}) is stopped.")
        if not after:
            lines.append("The run's store does not answer: the process that has it, rank 0 or a launcher, is lost.")
            lines.append(f"  rank {self._rank} ({self._own}): {self._what()}")
            silent, unknown = [], []
        if silent or unknown:
            which = ", ".join(map(str, sorted({*silent, *unknown})))
            lines.append(f"Nothing was heard of rank {which}: stopped, or its machine is lost.")
        elif busy:
            which = ", ".join(map(str, busy))
            lines.append(f"Rank {which} {'waits' if len(busy) == 1 else 'wait'} for no other rank: look there first.")
        for rank in sorted(after):
            status = after[rank]
            done = f"; last action done: {status['done']}" if status["done"] else ""
            heard = ", when it was last heard" * (rank in silent)
            at = str(Process(*status["process"]))
            lines.append(f"  rank {rank} ({at}): {status['doing']}, for {status['for']:.0f} s{done}{heard}")
        self._say("\n".join(lines))
        self._try_to(lambda: self._board.post("reported", True))
        self._end("ends, as the run hangs", stacks=True)

    def _statuses(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for rank in range(self._world_size):
            status = self._try_to(lambda rank=rank: self._board.read(f"status/{rank}"))
            if status is not None:
                found[rank] = status
        return found

    def _what(self) -> str:
        progress = self._progress
        done = "" if progress.done is None else f"; last action done: {progress.done.action}"
        return f"{progress.describe()}, for {time.monotonic() - progress.since:.0f} s{done}"

    def _end_all(self, how: str, why: str, rank: int | None = None) -> End | None:
        """Post that the run ends because of this rank, or of another one, unless someone has; return what is posted."""
        note = End(rank=self._rank if rank is None else rank, how=how, why=why)
        return self._try_to(lambda: self._board.post_first("end", note))

    def _end(self, why: str, stacks: bool = False) -> None:
        """End this process, whatever its other threads do."""
        self._say(f"rank {self._rank} {why}")
        if stacks:
            faulthandler.dump_traceback(all_threads=True, file=STDERR)
            if (path := self._try_to(lambda: keep_flight_record(self._rank))) is not None:
                self._say(f"rank {self._rank}: torch's flight recorder was saved in {path}, for torchfrtrace")
        self._kill_stopped()
        for child in multiprocessing.active_children():  # a worker of a DataLoader may hang, and would stay
            self._try_to(child.kill)
        os._exit(1)

    def _kill_stopped(self) -> None:
        """Kill the next process if it is stopped, as it would stay when the run ends."""
        if self._next is not None and self._next.is_stopped():
            self._next.kill()

    def _say(self, text: str) -> None:
        """Write directly, as the thread that hangs may hold the lock of `sys.stderr`."""
        self._try_to(lambda: os.write(STDERR, f"[bigmac] {text}\n".encode()))

    @staticmethod
    def _try_to(do: Callable[[], Any]) -> Any:
        try:
            return do()
        except Exception:
            return None
