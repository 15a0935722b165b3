"""SampleImages: pictures that the generators draw after a validation."""

from contextlib import nullcontext
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from bigmac_lightning.callbacks.shared import checked, filled, folder_of, replicas_of
from bigmac_lightning.checkpoints.remote import Place
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.ranks import Ranks


class SampleImages(pl.Callback):
    """Lets the generators draw for the DataModule's prediction prompts, and writes a PNG with a grid of the pictures
    and an image for TensorBoard.

    It works under any strategy, and data-parallel replicas divide the prompts among themselves.

    Args:
        every_n_epochs: draw after the validation of every n-th epoch of a training, and after the last.
        columns: the number of pictures in a row of the grid.
        value_range: the values of a black and of a white pixel.
        dirpath: the folder for ``samples.png``; ``None``: the logger's directory.

    Attributes:
        artifacts: the files that were written, on global rank 0.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        columns: int = 10,
        value_range: tuple[float, float] = (-1.0, 1.0),
        dirpath: str | None = None,
    ) -> None:
        self.every_n_epochs, self.columns, self.value_range, self.dirpath = (
            every_n_epochs,
            columns,
            value_range,
            dirpath,
        )
        self.artifacts: list[Place] = []
        self._ranks = Ranks()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, trains = trainer.current_epoch + 1, trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (trains and epoch % self.every_n_epochs and epoch != trainer.max_epochs):
            return
        drawn = self._draw(trainer, checked(self, pl_module))
        folder = folder_of(trainer, self.dirpath)  # collective
        if not trainer.is_global_zero or not drawn:
            return
        from torchvision.utils import make_grid, save_image

        times = max(1, 64 // min(drawn[0].shape[-2:]))  # small pictures are enlarged to about 64 pixels
        enlarged = [image.repeat_interleave(times, -1).repeat_interleave(times, -2) for image in drawn]
        low, high = self.value_range
        enlarged = [((image - low) / (high - low)).clamp(0, 1) for image in enlarged]
        grid = make_grid(enlarged, self.columns, padding=4, pad_value=0.5)
        with filled(folder) as local:
            save_image(grid, local / "samples.png")
        self.artifacts = [folder / "samples.png"]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, trainer.global_step)

    def _draw(self, trainer: pl.Trainer, module: PipelineModule) -> list[Tensor]:
        """The pictures of all replicas in the order of the prompts. Replica r of R has drawn for the prompts r, r + R,
        r + 2R, ... Collective."""
        datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        precision = trainer.precision_plugin
        own: list[Tensor] = []
        for batch in datamodule.predict_dataloader():
            given = precision.convert_input(batch).to(module.device)
            with nullcontext() if module.runner is not None else precision.forward_context():
                own += [sample.float().cpu() for sample in module.pipeline(given, sample=True).samples or []]
        replicas, replica = replicas_of(trainer)
        gathered, _ = self._ranks.exchange((replica, own))()
        by_replica = dict(gathered)
        rounds = zip_longest(*(by_replica[r] for r in range(replicas)))
        return [image for turn in rounds for image in turn if image is not None]
