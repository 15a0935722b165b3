"""The place of a training run for checkpoints: which batches an optimizer step has used, and which one comes next.

Lightning's checkpoints count batches but hold no gradients, so one that is saved between two optimizer steps would lose
the gradients of the batches since the last step. Here a checkpoint always has the place of the last step, whenever it
is saved, and the batches since then run again.
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

from bigmac_lightning.checkpoints import after_batch


class ResumableLoader(ABC):
    """A training loader that can continue at any batch, within an epoch and between two.

    It records its place after each batch. Its state is the place that it had at the last optimizer step.

    Attributes:
        uncounted: tells how many of the last batches no optimizer step has used yet; ``None``: always 0.
        stands: the places that it has had since the last optimizer step; the last one is its place now.
        resumes: whether the next iterator begins at its place, which `load_state_dict` has set.
    """

    def __init__(self, uncounted: Callable[[], int] | None = None) -> None:
        self.uncounted = uncounted
        self.stands: list[dict[str, Any]] = []
        self.resumes = False

    def reach(self, stand: dict[str, Any]) -> None:
        """Record a place. It must be called before a batch is handed out."""
        del self.stands[: -1 - self._back()]
        self.stands.append(stand)

    def state_dict(self) -> dict[str, Any]:
        """The place at the last optimizer step. It is the same on all ranks, and for any number of pipeline ranks and
        workers."""
        return {
            "kind": type(self).__name__,
            **self.describe(),
            **self.stands[max(0, len(self.stands) - 1 - self._back())],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the place of another loader.

        Raises:
            ValueError: this loader would give other samples; on all ranks.
        """
        if state.get("kind") != type(self).__name__:
            within = 0 < state.get("step", 1) < state.get("steps", 2)
            if not within and "position" not in {**state, **self.stands[-1]}:
                return  # the other loader had finished its epoch, so this one begins the next epoch
            raise ValueError(
                f"the run was saved with another kind of training loader ({state.get('kind', 'not known here')}), and "
                f"now has {type(self).__name__}: its place in the data is not known. Restore the data, or start from "
                "the weights alone"
            )
        self.stands, self.resumes = [self.stand_of(state)], True

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What must be the same in a loader that continues at this one's place."""

    @abstractmethod
    def stand_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """The place in a state."""

    def _back(self) -> int:
        return 0 if self.uncounted is None else self.uncounted()


def uncounted(trainer: pl.Trainer) -> int:
    """How many batches the training loop has taken in this epoch that no optimizer step has used yet."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    taken, processed = progress.current.ready, progress.current.processed
    if processed == taken and (progress.is_last_batch or taken >= trainer.num_training_batches):
        return 0  # Lightning makes a step after the last batch
    return taken - (processed - processed % trainer.accumulate_grad_batches)


def uncounted_in(trainer: object) -> Callable[[], int] | None:
    """A function that returns `uncounted` of a trainer; ``None`` without a trainer."""
    return partial(uncounted, trainer) if isinstance(trainer, pl.Trainer) else None


def repeats_batches(trainer: object) -> bool:
    """Whether all epochs must have the same batches, because of `Trainer(overfit_batches=...)`."""
    batches: Any = getattr(trainer, "overfit_batches", 0) if isinstance(trainer, pl.Trainer) else 0
    return batches > 0


def stand_at_last_step(checkpoint: dict[str, Any], trainer: pl.Trainer | None) -> None:
    """Set the counters of a checkpoint's loops back to the last optimizer step, to which the states of
    `ResumableLoader`s belong, and note what is due after it.

    Args:
        trainer: the trainer that saves the checkpoint; ``None``: the training was in other processes.
    """
    back = 0 if trainer is None else uncounted(trainer)
    if trainer is None or "loops" not in checkpoint:
        return
    after_batch.note_metrics(checkpoint, trainer)
    if not back:
        after_batch.note_due(checkpoint, trainer)
        return
    now = trainer.fit_loop.epoch_loop.batch_progress
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for which, batches in (("current", now.current.ready - back), ("total", now.total.ready - back)):
        progress[which].update(ready=batches, started=batches, processed=batches, completed=batches)
    progress["is_last_batch"] = False
    if after_batch.is_within_validation(trainer):
        after_batch.forget_validation(checkpoint)
    combined: Any = trainer.fit_loop._combined_loader
    others = [x for x in combined.flattened if isinstance(x, _Stateful) and not isinstance(x, ResumableLoader)]
    if names := sorted({type(loader).__name__ for loader in others if not getattr(loader, "rewinds", False)}):
        rank_zero_warn(
            f"{back} batches since the last optimizer step have gradients that are not saved. A run that resumes from "
            f"this checkpoint should run them again, but leaves them out, as the state of {', '.join(names)} cannot go "
            "back: save after an optimizer step"
        )


def go_on(trainer: pl.Trainer) -> None:
    """Let a training begin at the place of its checkpoint.

    It must be called after the loops have been restored, and before the first batch is taken.

    Raises:
        ValueError: the checkpoint has states of loaders, and the run has no loaders for them; on all ranks.
    """
    loop: Any = trainer.fit_loop
    if not loop.is_resuming:
        return
    after_batch.make_up(trainer, getattr(trainer.lightning_module, "resumed_metrics", None))
    if loop.restarted_on_epoch_end:  # with max_steps, Lightning would count the finished epoch twice
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        _Loop.restarting.fset(loop, False)  # pyright: ignore[reportOptionalCall]
    _complete_callbacks(trainer)
    if loop._combined_loader is not None:
        _resume_loaders(loop)
    after_batch.end_epoch(trainer)


def _complete_callbacks(trainer: pl.Trainer) -> None:
    """Restore what Lightning's callbacks do not restore when a run is resumed."""
    callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        if isinstance(callback, BaseFinetuning):  # it has frozen again what it had unfrozen before
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            for parameter in (parameter for group in groups for parameter in group["params"]):
                parameter.requires_grad_(True)
        if isinstance(callback, GradientAccumulationScheduler):  # it would set this only at the next epoch
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)


def _resume_loaders(loop: Any) -> None:
    """Give loaders their states, which Lightning has not done: it made the loaders before it read the checkpoint."""
    progress, combined = loop.epoch_loop.batch_progress, loop._combined_loader
    states: list[dict[str, Any]] = loop._combined_loader_states_to_load
    taken = 0 if progress.is_last_batch else progress.current.processed
    stateful = [loader for loader in combined.flattened if isinstance(loader, _Stateful)]
    resumable = all(isinstance(getattr(loader, "loader", loader), ResumableLoader) for loader in stateful)
    if not taken and not (resumable and all("kind" in state for state in states)):
        states = []  # as in Lightning: it is not known what the state of another loader means between epochs
    if states and len(states) == len(stateful):
        for loader, state in zip(stateful, states, strict=True):
            loader.load_state_dict(state)
        iter(loop._data_fetcher)  # other loaders use their state here
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
