"""What Lightning does after a batch: validation, schedules that follow a metric, the end of an epoch.

Lightning's checkpoints do not say how much of this was still to be done when they were saved, and a resumed run leaves
all of it out. Here a checkpoint that is saved at the end of a batch says what is due after it, and every checkpoint has
the metrics that schedules and callbacks may look at.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from torch import Tensor

METRICS = "callback_metrics"
"""The key of the metrics in the state of the fit loop, where Lightning does not mind it."""


def note_metrics(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Note in a checkpoint the metrics that callbacks may look at now."""
    state, metrics = checkpoint["loops"]["fit_loop"]["state_dict"], trainer.callback_metrics
    state[METRICS] = {name: value.detach().cpu().clone() for name, value in metrics.items()}


def note_due(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Note in a checkpoint what is due after the last batch."""
    loop: Any = trainer.fit_loop
    saved, batches = checkpoint["loops"]["fit_loop"], loop.epoch_loop.batch_progress
    if is_within_validation(trainer):
        _note_validation(saved, trainer)
        return
    if batches.total.processed == batches.total.completed or loop._data_fetcher is None:
        return  # the batch has ended, or there was none
    validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    if not validates and not loop.epoch_loop._num_ready_batches_reached():
        return
    for which in ("current", "total"):  # as after the batch, or Lightning would leave out what is due
        saved["epoch_loop.batch_progress"][which].update(completed=getattr(batches, which).processed)
    if validates:
        _note_validation(saved, trainer)


def is_within_validation(trainer: pl.Trainer) -> bool:
    """Whether the training has been stopped within a validation."""
    total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    return total.ready > total.completed


def _note_validation(saved: dict[str, Any], trainer: pl.Trainer) -> None:
    """Note that a validation has begun, and done no batch. Lightning repeats such a one, but not batches that it has
    done."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    done = progress.total.completed - progress.current.completed * is_within_validation(trainer)
    saved["epoch_loop.val_loop.batch_progress"].update(
        current=dict.fromkeys(("ready", "started", "processed", "completed"), 0),
        total={"ready": done + 1, "started": done + 1, "processed": done, "completed": done},
        is_last_batch=False,
    )


def forget_validation(checkpoint: dict[str, Any]) -> None:
    """Let a resumed training come to the last validation once more."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"] - progress["current"]["completed"]
    for which, count in (("current", 0), ("total", done)):
        progress[which] = dict.fromkeys(("ready", "started", "processed", "completed"), count)
    progress["is_last_batch"] = False


def metrics_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The metrics in a checkpoint; ``None``: it has none, as those of earlier versions."""
    return checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get(METRICS)


def make_up(trainer: pl.Trainer, metrics: Mapping[str, Tensor] | None) -> None:
    """Let a resumed training do first what was due after the last batch.

    It must be called when the training starts, before anything of the loops' state is changed.

    Args:
        metrics: those of the checkpoint.
    """
    loop: Any = trainer.fit_loop
    epoch, validation = loop.epoch_loop, loop.epoch_loop.val_loop
    if validation.restarted_mid_evaluation:
        total = validation.batch_progress.total
        total.ready = total.started = total.completed
    if metrics is None:
        return
    trainer._logger_connector._callback_metrics.update(metrics)
    if loop.restarted_on_epoch_end:
        epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    loop._restarting = False  # else the schedules that follow a metric would not be updated at this epoch's end


def end_epoch(trainer: pl.Trainer) -> None:
    """Let the epoch end at once if it had no batches left, and no validation is due. It must be called after the loader
    has been given its state."""
    loop: Any = trainer.fit_loop
    epoch, fetcher = loop.epoch_loop, loop._data_fetcher
    ends = loop.restarted_mid_epoch and epoch.restarted_on_last and epoch._num_ready_batches_reached()
    if (
        ends
        and not epoch._should_check_val_fx(fetcher)
        and isinstance(fetcher, _PrefetchDataFetcher)
        and not fetcher.done
    ):
        fetcher.done = True
        fetcher.batches.clear()
        epoch._batches_that_stepped += 1
