"""What a PipelineModule does about checkpoints, whatever the strategy is: it reads every kind that there is.

Knows Lightning's hooks; what a part of a model is, and how parts are saved, is the strategy's business.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch.optim import Optimizer

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.optimizer_state import numbered_state
from bigmac_lightning.checkpoints.reading import DirectoryCheckpointIO, read_directory
from bigmac_lightning.checkpoints.resuming import go_on, stand_at_last_step
from bigmac_lightning.contracts.refused_callbacks import check_callbacks


class ResumableModule(pl.LightningModule):
    """A LightningModule that is resumed exactly, from the directories and files of strategy="bigmac" as well.

    Who overrides one of these hooks calls the one of this class, too.
    """

    @property
    def tied_copies(self) -> dict[str, str]:
        """For each tied weight, the name of the weight that it is a copy of, as in `state_dict`."""
        return {}

    def configure_model(self) -> None:
        """Lets the strategy read directories, if it reads files, and refuses callbacks that cannot work.

        Raises:
            ValueError: names such a callback.
        """
        if self._trainer is None:
            return
        check_callbacks(self._trainer)
        if type(self._trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self._trainer.strategy.checkpoint_io = DirectoryCheckpointIO()

    def on_fit_start(self) -> None:
        """Lets optimizers load states that go by names."""
        for optimizer in self.trainer.optimizers:
            optimizer.register_load_state_dict_pre_hook(partial(_to_numbers, self))

    def on_train_start(self) -> None:
        """Lets the training begin where its checkpoint stands."""
        go_on(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets the checkpoint stand where the last optimizer step was."""
        stand_at_last_step(checkpoint, self._trainer)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As of every LightningModule; `checkpoint_path` may be a directory that strategy="bigmac" has written."""
        if not isinstance(checkpoint_path, str | Path) or not files.is_directory(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        with tempfile.TemporaryFile() as file:
            torch.save(read_directory(files.present(Path(checkpoint_path))), file)
            file.seek(0)
            return super().load_from_checkpoint(file, *args, **kwargs)


def _to_numbers(module: ResumableModule, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return numbered_state(module, module.tied_copies, optimizer, state) if "groups" in state else state
