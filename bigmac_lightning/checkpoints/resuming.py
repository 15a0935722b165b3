"""Where a training run stands, for checkpoints: which batches count already, and which one comes next.

Lightning's checkpoints count batches, and hold no gradients: one that is saved between two optimizer steps would lose
those of the batches since. Here a checkpoint stands at the last step, whenever it is saved, and those batches run
again. Knows Lightning's loops and the protocol of stateful loaders; knows nothing of pipelines.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # pyright: ignore[reportPrivateImportUsage]


class ResumableLoader(ABC):
    """A training loader that can go on anywhere, within an epoch and between two.

    It notes where it stands after each batch, as far back as to the last optimizer step; that is its state.

    Attributes:
        uncounted: how many of its last batches do not count yet.
        stands: where it stood, and stands.
        resumes: whether the next iterator, when its first batch is asked for, begins where it stands, as it was told by
            `load_state_dict`.
    """

    def __init__(self, uncounted: Callable[[], int] | None = None) -> None:
        self.uncounted = uncounted
        self.stands: list[dict[str, Any]] = []
        self.resumes = False

    def reach(self, stand: dict[str, Any]) -> None:
        """Note where it stands; to be called before a batch is handed out."""
        del self.stands[: -1 - self._back()]
        self.stands.append(stand)

    def state_dict(self) -> dict[str, Any]:
        """Equal on all ranks, and for any number of pipeline ranks and workers."""
        return {
            "kind": type(self).__name__,
            **self.describe(),
            **self.stands[max(0, len(self.stands) - 1 - self._back())],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was.

        Raises:
            ValueError: this one would give other samples; on all ranks.
        """
        if state.get("kind") != type(self).__name__:
            within = 0 < state.get("step", 1) < state.get("steps", 2)
            if not within and "position" not in {**state, **self.stands[-1]}:
                return  # an epoch of other data was finished
            raise ValueError(
                f"the run was saved with another kind of training loader ({state.get('kind', 'not known here')}), and "
                f"now has {type(self).__name__}: its place in the data is not known. Restore the data, or start from "
                "the weights alone"
            )
        self.stands, self.resumes = [self.stand_of(state)], True

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What has to be the same when another loader goes on."""

    @abstractmethod
    def stand_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """Where to go on, by a state."""

    def _back(self) -> int:
        return 0 if self.uncounted is None else self.uncounted()


def uncounted(trainer: pl.Trainer) -> int:
    """How many of the batches that the training loop has taken in this epoch no optimizer step has used yet."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    taken, processed = progress.current.ready, progress.current.processed
    if processed == taken and (progress.is_last_batch or taken >= trainer.num_training_batches):
        return 0  # the last batch is followed by a step
    return taken - (processed - processed % trainer.accumulate_grad_batches)


def uncounted_in(trainer: object) -> Callable[[], int] | None:
    """The same, to be asked again and again; ``None`` without a trainer."""
    return partial(uncounted, trainer) if isinstance(trainer, pl.Trainer) else None


def repeats_batches(trainer: object) -> bool:
    """Whether all epochs are to have the same batches, as `Trainer(overfit_batches=...)` wants it."""
    batches: Any = getattr(trainer, "overfit_batches", 0) if isinstance(trainer, pl.Trainer) else 0
    return batches > 0


def stand_at_last_step(checkpoint: dict[str, Any], trainer: pl.Trainer | None) -> None:
    """Let a checkpoint's loops stand where the last optimizer step was, as the states of `ResumableLoader`s do.

    Args:
        trainer: that is saving it; ``None``: the training was in other processes.
    """
    back = 0 if trainer is None else uncounted(trainer)
    if trainer is None or not back or "loops" not in checkpoint:
        return
    now = trainer.fit_loop.epoch_loop.batch_progress
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for which, batches in (("current", now.current.ready - back), ("total", now.total.ready - back)):
        progress[which].update(ready=batches, started=batches, processed=batches, completed=batches)
    progress["is_last_batch"] = False


def go_on(trainer: pl.Trainer) -> None:
    """Let a training begin where its checkpoint stands.

    To be called when the loops have been restored and no batch has been taken yet.

    Raises:
        ValueError: the checkpoint has states of loaders, and there are no such loaders; on all ranks.
    """
    loop: Any = trainer.fit_loop
    if not loop.is_resuming:
        return
    if loop.restarted_on_epoch_end:  # with max_steps; Lightning would count the finished epoch twice
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        _Loop.restarting.fset(loop, False)  # pyright: ignore[reportOptionalCall]
    _complete_callbacks(trainer)
    if loop._combined_loader is not None:
        _resume_loaders(loop)


def _complete_callbacks(trainer: pl.Trainer) -> None:
    """What Lightning's callbacks leave undone when a run is resumed."""
    callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        if isinstance(callback, BaseFinetuning):  # optimizers have what it had unfrozen, which is frozen again
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            for parameter in (parameter for group in groups for parameter in group["params"]):
                parameter.requires_grad_(True)
        if isinstance(callback, GradientAccumulationScheduler):  # it would begin with the next epoch
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)


def _resume_loaders(loop: Any) -> None:
    """Give loaders the states that Lightning still has in its hands, as it made the loaders before it read them."""
    progress, combined = loop.epoch_loop.batch_progress, loop._combined_loader
    states: list[dict[str, Any]] = loop._combined_loader_states_to_load
    taken = 0 if progress.is_last_batch else progress.current.processed
    stateful = [loader for loader in combined.flattened if isinstance(loader, _Stateful)]
    resumable = all(isinstance(getattr(loader, "loader", loader), ResumableLoader) for loader in stateful)
    if not taken and not (resumable and all("kind" in state for state in states)):
        states = []  # what another loader's state means between epochs is not known, and Lightning does without
    if states and len(states) == len(stateful):
        for loader, state in zip(stateful, states, strict=True):
            loader.load_state_dict(state)
        iter(loop._data_fetcher)  # other loaders look at their state here
    elif states:
        raise ValueError(
            f"the checkpoint was saved after {taken} batches of an epoch and says where each of {len(states)} loaders "
            f"stood, but {len(stateful)} of this run's {len(combined.flattened)} training loaders have a "
            "load_state_dict: resume with the loaders that it was saved with, or from a checkpoint of an epoch's end"
        )
    elif taken and len(stateful) < len(combined.flattened):
        rank_zero_warn(
            f"the checkpoint was saved after {taken} batches of an epoch, but the training loader cannot go on there: "
            f"it gives the epoch's first batches once more, and not its last {taken}. Give it state_dict and "
            "load_state_dict, or resume from a checkpoint of an epoch's end"
        )
    loop._combined_loader_states_to_load = []
