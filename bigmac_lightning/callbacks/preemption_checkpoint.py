"""A callback that saves a checkpoint when a signal stops the training."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.agreement import on_first_rank
from bigmac_lightning.checkpoints.remote import Place, at


class PreemptionCheckpoint(pl.Callback):
    """Saves a checkpoint when SIGTERM or ctrl-C stops the training, as when a cluster takes its nodes back.

    It does not matter which process gets the signal: all ranks stop together between two batches. Other errors save
    nothing here, as they may have spoilt the weights.

    Attributes:
        path: where the checkpoint is; ``None`` before one was saved.

    Args:
        dirpath: where; ``None``: where the first ModelCheckpoint of the Trainer saves, or else in the Trainer's
            `default_root_dir`.
        filename: the checkpoint's name, without its ending. The checkpoint of this name that the run was resumed from
            is replaced. One of another run stays; then this run's name ends with "-v1" or a higher number.
    """

    saves_when_stopped = True

    def __init__(self, dirpath: str | Path | None = None, filename: str = "preempted") -> None:
        self.dirpath, self.filename = dirpath, filename
        self.path: Place | None = None
        self._place: Place | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the place now, as ranks that were stopped cannot always ask each other. Collective."""
        others = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        folder = at(self.dirpath or (others[0] if others else trainer.default_root_dir))
        resumed_from = trainer.ckpt_path
        self._place = on_first_rank(lambda: self._free_place(folder, resumed_from), f"cannot look into {folder}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        place = self._place
        stopped = isinstance(exception, SIGTERMException | KeyboardInterrupt)
        if place is None or not stopped or not trainer.global_step:
            return
        trainer.save_checkpoint(str(place))
        self.path = place if place.exists() else None

    def _free_place(self, folder: Place, resumed_from: str | Path | None) -> Place:
        """The first place where there is no checkpoint, or only the one that the run was resumed from."""
        names = itertools.chain([self.filename], (f"{self.filename}-v{k}" for k in itertools.count(1)))
        places: Iterator[Place] = (folder / f"{name}.ckpt" for name in names)
        return next(filter(lambda place: _is_free(place, resumed_from), places))


def _is_free(path: Place, resumed_from: str | Path | None) -> bool:
    try:
        place = files.present(path)
    except FileNotFoundError:
        return True
    return resumed_from is not None and at(resumed_from).resolve() in (place.resolve(), path.resolve())
