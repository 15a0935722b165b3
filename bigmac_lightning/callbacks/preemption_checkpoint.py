"""A callback that saves a checkpoint when a signal stops the training."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class PreemptionCheckpoint(pl.Callback):
    """Saves a checkpoint when SIGTERM or ctrl-C stops the training, as when a cluster takes its nodes back.

    It does not matter which process gets the signal: all ranks stop together between two batches. Other errors save
    nothing here, as they may have spoilt the weights.

    Attributes:
        path: where the checkpoint is; ``None`` before one was saved.

    Args:
        dirpath: where; ``None``: where the first ModelCheckpoint of the Trainer saves, or else in the Trainer's
            `default_root_dir`.
        filename: the checkpoint's name, without its ending. An older one of this name is replaced.
    """

    saves_when_stopped = True

    def __init__(self, dirpath: str | Path | None = None, filename: str = "preempted") -> None:
        self.dirpath, self.filename = dirpath, filename
        self.path: Path | None = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException | KeyboardInterrupt) or not trainer.global_step:
            return
        others = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        path = Path(self.dirpath or (others[0] if others else trainer.default_root_dir)) / f"{self.filename}.ckpt"
        trainer.save_checkpoint(path)
        self.path = path if path.exists() else None
