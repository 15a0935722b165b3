"""The first batch of a training, as its DataModule makes it, without starting the training.

One process asks the DataModule, as Lightning's training loop does. No media are read, and no weights are made.
"""

import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn

from bigmac_lightning.contracts.batch import Batch, MediaItem, PipelineLayout, TargetItem
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.training.batch_checks import check_batch, check_ids
from bigmac_lightning.training.strategy import BigMacStrategy


class Outside(PipelineLayout):
    """What a DataModule is told about a pipeline in a process that owns no items, and so decodes none."""

    def owns(self, item: MediaItem | TargetItem) -> bool:
        return False


class UnstartedStrategy(BigMacStrategy):
    """The strategy of a run of which no process was started.

    Args:
        layout: what `pipeline_layout` is.
        replicas: the number of pipelines; data are those of the first one.
    """

    def __init__(self, layout: PipelineLayout, replicas: int) -> None:
        super().__init__()
        self._place = layout, {"num_replicas": replicas, "rank": 0}

    @property
    def pipeline_layout(self) -> PipelineLayout:
        return self._place[0]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return self._place[1]


def first_batch(
    module: PipelineModule,
    data: pl.LightningDataModule,
    layout: PipelineLayout,
    replicas: int,
    arguments: Mapping[str, Any],
) -> Batch:
    """The first batch of the first pipeline, without contents of media and targets.

    It is that of a run if what the DataModule gives depends on its own seed and on the random state in `setup`.

    Args:
        module: the model, on the meta device.
        layout: what a process of the pipeline is told.
        replicas: the number of pipelines.
        arguments: those of the Trainer that decide which batches there are, and the numbers of devices and nodes.

    Raises:
        TypeError, ValueError: there is no batch, or a training would refuse it.
    """
    outside = Outside(**vars(layout))
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=UnstartedStrategy(outside, replicas),
            plugins=[LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            **arguments,
        )
        trainer.state.fn, trainer.training = TrainerFn.FITTING, True
        trainer.strategy.connect(module)
        try:
            trainer._data_connector.attach_data(module, datamodule=data)
            reset_seed()
            trainer._data_connector.prepare_data()
            call._call_lightning_datamodule_hook(trainer, "setup", stage="fit")
            loop = trainer.fit_loop
            loop.setup_data()
            if loop._data_fetcher is None or loop.max_batches == 0:
                raise ValueError("the training has no batches")
            given, _, _ = next(loop._data_fetcher)
            loop.teardown()
        finally:
            module._trainer = None
    check_batch(given, "train", outside, module)
    check_ids(given, module.llm, torch.device("cpu"))
    return given


@contextmanager
def _quiet() -> Generator[None]:
    """Without Lightning's messages about the Trainer, which are about a run."""
    loggers = [logging.getLogger(f"lightning.{name}.utilities.rank_zero") for name in ("fabric", "pytorch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
