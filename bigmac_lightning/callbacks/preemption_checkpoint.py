"""A callback that saves a checkpoint when a signal stops the training."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class PreemptionCheckpoint(OnExceptionCheckpoint):
    """Saves a checkpoint when SIGTERM or ctrl-C stops the training, as when a cluster takes its nodes back.

    It does not matter which process gets the signal: all ranks stop together between two batches. Other errors save
    nothing here, as they may have spoilt the weights.

    Args:
        dirpath: where; ``None``: where the first ModelCheckpoint of the Trainer saves, or else in "checkpoints" in the
            Trainer's folder of logs.
        filename: the checkpoint's name, without its ending. An older one of this name is replaced.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = "preempted") -> None:
        super().__init__("" if dirpath is None else dirpath, filename)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if (
            not isinstance(exception, SIGTERMException | KeyboardInterrupt)
            or not trainer.fit_loop.epoch_loop.global_step
        ):
            return
        if not self.dirpath:
            others = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
            self.dirpath = others[0] if others else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        super().on_exception(trainer, pl_module, exception)
