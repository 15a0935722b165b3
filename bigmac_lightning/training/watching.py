"""What keeps a run from hanging, or from ending with some of its processes only: a watchdog, signals that all ranks
obey together, and short words where the cause of an error is on another rank."""

import itertools
import sys
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from bigmac_lightning.runtime.board import Board
from bigmac_lightning.runtime.progress import Progress
from bigmac_lightning.runtime.watchdog import Watchdog
from bigmac_lightning.training.stopping import Stopping

RUNS = itertools.count()
"""Numbers of the runs of this process. All processes of a run count alike."""

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
"""What torch says when another process has closed its end of a connection."""

TO_HEAR = 3.0
"""Seconds in which the rank that has failed first must have told the others so."""


class Watching:
    """Watches over this process, from the time when processes know each other to the end of a run.

    Args:
        trainer: the Trainer of the run.
        progress: what this process is doing.
        hang_timeout: how long it may do nothing new in a loop; ``None``: as long as it likes.
        timeout: the timeout of process groups, which holds outside of loops.
    """

    def __init__(
        self, trainer: pl.Trainer, progress: Progress, hang_timeout: timedelta | None, timeout: timedelta | None
    ) -> None:
        board, patience = Board(f"run {next(RUNS)}"), None if hang_timeout is None else hang_timeout.total_seconds()
        longest = None if timeout is None else timeout.total_seconds()
        self._trainer, self._progress, self._told = trainer, progress, False
        self._stopping = Stopping(trainer, board, self._abandon)
        self._watchdog = Watchdog(
            board, dist.get_rank(), dist.get_world_size(), progress, patience, longest, self._stopping.share
        )
        self._stopping.install()
        self._watchdog.start()

    def expect_loops(self, group: dist.ProcessGroup | None) -> None:
        """Let the training stop between two batches, once Lightning has registered its handlers of signals.

        Args:
            group: a process group of all processes on the CPU; ``None`` if there is one process.
        """
        self._stopping.enter_loops()
        # Lightning's own waits for rank 0 before each batch, and for the device, and obeys signals of rank 0 only
        agree: Any = partial(self.before_batch, group)
        self._trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = agree

    def enter_loop(self) -> None:
        """A loop begins, in which a process that does nothing new hangs."""
        self._progress.begin("the start of a loop")
        self._watchdog.enter_loops()

    def leave_loop(self) -> None:
        """The loop has ended."""
        self._watchdog.in_loops = False

    @contextmanager
    def patient(self) -> Generator[None, None, None]:
        """Within it something may take long, such as writing a large checkpoint. Timeouts of process groups hold."""
        before, self._watchdog.in_loops = self._watchdog.in_loops, False
        self._progress.begin("saving a checkpoint", together=True)
        yield
        self._progress.begin("what follows a checkpoint")
        if before:
            self._watchdog.enter_loops()  # which looks at once: its last look may have been a patient one

    def before_batch(self, group: dist.ProcessGroup | None) -> None:
        """Stop here if all ranks of the group have agreed to. Collective over the group."""
        self._progress.begin("the question whether to stop", together=True)
        self._stopping.before_batch(group)
        self._progress.begin("loading the next batch")

    def failed(self, exception: BaseException) -> None:
        """Tell the other ranks of an error, so that they do not wait for this one. Later calls do nothing."""
        if self._told:
            return
        self._told = True
        if self._stopping.agreed:
            self._stopping.tell()
            return
        lost, words, rank = _is_lost_connection(exception), _in_one_line(exception), dist.get_rank()
        end = self._watchdog.fail(words, TO_HEAR if lost else 0)
        if end is not None and lost:
            cause = f"rank {end['rank']} {end['how']}: {end['why']}"
            sys.excepthook = ExceptHook(exception, f"rank {rank} has lost its connection to others, as {cause}")
        elif end is not None and end["why"] == words:
            sys.excepthook = ExceptHook(exception, f"rank {rank} ends with the same error as rank {end['rank']}")

    def stop(self) -> None:
        """The run is over."""
        self._stopping.restore()
        self._watchdog.stop()

    def _abandon(self, why: str) -> None:
        self._watchdog.fail(why)


def _in_one_line(exception: BaseException) -> str:
    """What has happened, and where, if a note says it."""
    first = (str(exception).strip().splitlines() or [""])[0]
    where = "".join(getattr(exception, "__notes__", ())[:1])
    return f"{type(exception).__name__}: {first}" + f" ({where})" * bool(where)


def _is_lost_connection(exception: BaseException) -> bool:
    return isinstance(exception, RuntimeError) and any(words in str(exception) for words in LOST)


class ExceptHook:
    """Lets an exception end the process with one line, and no traceback: its cause is in another process."""

    def __init__(self, exception: BaseException, text: str) -> None:
        self.exception, self._text, self._given = exception, text, sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if error is self.exception:
            sys.stderr.write(f"[bigmac] {self._text}\n")
        else:
            self._given(kind, error, traceback)


def is_of_another_rank(exception: BaseException) -> bool:
    """Whether another rank has ended with this error before, and shows it."""
    return isinstance(sys.excepthook, ExceptHook) and sys.excepthook.exception is exception
