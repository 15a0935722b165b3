"""How a PipelineModule reads and resumes from checkpoints, under any strategy.

What each rank saves under strategy="bigmac" is up to the strategy.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.optim import Optimizer

from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.checkpoints.after_batch import metrics_in
from bigmac_lightning.checkpoints.optimizer_state import numbered_state
from bigmac_lightning.checkpoints.reading import DirectoryCheckpointIO, read_directory, refuse
from bigmac_lightning.checkpoints.remote import at
from bigmac_lightning.checkpoints.resuming import go_on, stand_at_last_step
from bigmac_lightning.checkpoints.safe import naming, trusting
from bigmac_lightning.checkpoints.weights import check_tied
from bigmac_lightning.contracts.refused_callbacks import check_callbacks


class ResumableModule(pl.LightningModule):
    """A LightningModule that is resumed exactly, from the directories and files of strategy="bigmac" as well.

    A subclass that overrides one of these hooks must call the hook of this class as well.

    Attributes:
        resumed_metrics: the metrics of the checkpoint that was loaded last; ``None``: there is none, or it has none.
    """

    resumed_metrics: dict[str, Tensor] | None = None

    @property
    def tied_copies(self) -> dict[str, str]:
        """For each tied weight, the name of the weight that it is a copy of, as in `state_dict`."""
        return {}

    def configure_model(self) -> None:
        """Let a strategy that reads files read checkpoint directories as well, and refuse callbacks that cannot work.

        Raises:
            ValueError: such a callback is in use; the message names it.
        """
        if self._trainer is None:
            return
        check_callbacks(self._trainer)
        if type(self._trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self._trainer.strategy.checkpoint_io = DirectoryCheckpointIO()

    def on_fit_start(self) -> None:
        """Let optimizers load states whose entries are keyed by parameter names."""
        for optimizer in self.trainer.optimizers:
            optimizer.register_load_state_dict_pre_hook(partial(_to_numbers, self))

    def on_train_start(self) -> None:
        """Let the training continue at the batch after the checkpoint's last one."""
        go_on(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint's progress be that of the last optimizer step, as accumulated gradients are not saved."""
        stand_at_last_step(checkpoint, self._trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the checkpoint's metrics; refuse a checkpoint that has two different weights where this model ties
        them to one.

        Raises:
            ValueError: it has; the message names them.
        """
        check_tied(checkpoint["state_dict"], self.tied_copies, "the checkpoint")
        self.resumed_metrics = metrics_in(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """See LightningModule; `checkpoint_path` may also be a directory that strategy="bigmac" has written."""
        if len(args) < WEIGHTS_ONLY:  # Lightning would take ``None`` for ``False`` where the path is an address
            kwargs["weights_only"] = not trusting(kwargs.get("weights_only"))
        if not isinstance(checkpoint_path, str | Path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        place = files.present(at(checkpoint_path))
        if not place.is_dir():
            refuse(marker.problems(place), place)
            with naming(place):
                return super().load_from_checkpoint(str(place), *args, **kwargs)
        with tempfile.TemporaryFile() as file:
            torch.save(read_directory(place, kwargs.get("weights_only")), file)
            file.seek(0)
            return super().load_from_checkpoint(file, *args, **kwargs)


WEIGHTS_ONLY = 4
"""The place of `weights_only` among the arguments of `load_from_checkpoint` after the path."""


def _to_numbers(module: ResumableModule, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return numbered_state(module, module.tied_copies, optimizer, state) if "groups" in state else state
