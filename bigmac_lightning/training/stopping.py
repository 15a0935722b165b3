"""Lets all ranks of a run stop together when any of them is told to by a signal.

A signal only leaves a wish. Before each batch the ranks compare their wishes, without waiting for each other: the
comparison is started there, and its result is read before the next batch. So all stop at the same place, between two
batches, where a checkpoint can be saved. A second ctrl-C ends the process at once.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bigmac_lightning.runtime.board import Board

log = logging.getLogger(__name__)

NOTHING, END, REQUEUE, INTERRUPT = range(4)
"""What a signal wishes: nothing, SIGTERM, the signal by which SLURM announces the end of a job, ctrl-C."""

WORDS = {END: "SIGTERM", REQUEUE: "SLURM's signal", INTERRUPT: "ctrl-C"}


class Stopping:
    """The wishes of this rank's signals, and what all ranks have agreed on.

    Attributes:
        agreed: what all ranks have agreed on, one of the numbers above.

    Args:
        trainer: whose loops are to stop.
        board: where ranks of other pipelines read a wish.
        abandon: is called with a reason before this process ends alone.
    """

    def __init__(self, trainer: pl.Trainer, board: Board | None, abandon: Callable[[str], None]) -> None:
        self._trainer, self._board, self._abandon = trainer, board, abandon
        self.agreed = NOTHING
        self._wish, self._posted, self._in_loops = NOTHING, False, False
        self._comparison: tuple[dist.Work | None, torch.Tensor] | None = None
        self._given: dict[signal.Signals, Any] = {}
        self._slurm: Callable[..., None] | None = None
        self._process = os.getpid()

    # -- signals ---------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Take over SIGTERM and ctrl-C, if this is the main thread, which alone hears them."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._given[number] = signal.signal(number, self._hear)

    def enter_loops(self) -> None:
        """From now on, stop between two batches. Lightning registers its handlers, these ones, right after it."""
        connector: Any = self._trainer._signal_connector
        self._slurm = connector._slurm_sigusr_handler_fn
        connector._slurm_sigusr_handler_fn = self._hear
        connector._sigterm_notifier_fn = self._hear
        if signal.SIGTERM in self._given:
            signal.signal(signal.SIGTERM, self._given.pop(signal.SIGTERM))
        self._in_loops = True

    def restore(self) -> None:
        """Give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._given.items():
                if signal.getsignal(number) == self._hear:
                    signal.signal(number, handler)
                self._trainer._signal_connector._original_handlers.pop(number, None)  # it would give them back to us
        self._given.clear()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a DataLoader's worker, say, which has inherited the handler
            if number == signal.SIGTERM:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            return  # ctrl-C goes to all processes of a terminal, and workers are needed until all ranks stop
        wish = {signal.SIGTERM: END, signal.SIGINT: INTERRUPT}.get(signal.Signals(number), REQUEUE)
        if wish == INTERRUPT and (self._wish == INTERRUPT or not self._in_loops):
            self._abandon("was interrupted by ctrl-C" + " again" * self._in_loops)
            raise KeyboardInterrupt
        if not self._in_loops:
            self._abandon("was told to end by SIGTERM before the training began")
            raise SIGTERMException
        self._wish = max(self._wish, wish)  # nothing is said here: the signal may have come while something was

    def share(self) -> None:
        """Post this rank's wish, and read those of others. It is called by another thread than the others' calls."""
        if self._board is None:
            return
        if self._wish and not self._posted:
            log.warning("%s: all ranks stop before one of the next batches", WORDS[self._wish])
            self._board.post("wish", self._wish)
            self._posted = True
        elif not self._wish and (wish := self._board.read("wish")):
            self._wish, self._posted = wish, True

    # -- agreement -------------------------------------------------------------------------------------------------

    def before_batch(self, group: dist.ProcessGroup | None) -> None:
        """Stop if all ranks of the group have agreed to. Collective over the group.

        Args:
            group: a process group of the CPU; ``None``: this process alone.

        Raises:
            SIGTERMException, KeyboardInterrupt: they have; on all of these ranks before the same batch.
        """
        if self._comparison is not None:
            work, wishes = self._comparison
            if work is not None:
                work.wait()
            self.agreed = int(wishes)
        if self.agreed:
            self._comparison = None
            self._stop()
        wish = torch.tensor(self._wish)
        work = None if group is None else dist.all_reduce(wish, dist.ReduceOp.MAX, group=group, async_op=True)
        self._comparison = (work, wish)

    def _stop(self) -> None:
        if self.agreed == INTERRUPT:
            raise KeyboardInterrupt
        connector = self._trainer._signal_connector
        if self.agreed == REQUEUE and self._slurm is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._slurm(signal.SIGUSR1, None)
        connector.received_sigterm = True
        raise SIGTERMException

    def tell(self) -> None:
        """Say why the training has stopped, and if nothing of it was saved."""
        trainer = self._trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        saves = self.agreed == REQUEUE or any(
            isinstance(callback, OnExceptionCheckpoint)
            or getattr(callback, "saves_when_stopped", False)
            or (isinstance(callback, ModelCheckpoint) and callback.save_on_exception)
            for callback in callbacks
        )
        text = f"{WORDS[self.agreed]} has stopped the training after step {trainer.global_step}"
        if not saves:
            text += (
                ", and nothing was saved since the last checkpoint: the callback "
                "bigmac_lightning.callbacks.PreemptionCheckpoint saves one then"
            )
        if trainer.is_global_zero:
            log.warning(text)
