"""What all DataModules share: datasets of samples, the sampler, the collate function, this process's place.

The same DataModule serves strategy="auto", "ddp" and "bigmac". Knows Lightning's DataModule; knows nothing of
process groups: the strategy, if it runs pipelines, says what place in them this process has.
"""

from abc import ABC, abstractmethod

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from bigmac_lightning.checkpoints.resuming import uncounted_in
from bigmac_lightning.contracts.batch import Batch, PipelineLayout

from .loading.collate import Collator, Sample
from .loading.sampler import EpochLoader, EpochSampler


class PipelineDataset(Dataset, ABC):
    """Samples by epoch and index. What is random about a sample must depend on these (and a seed) alone."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, epoch: int, index: int) -> Sample:
        """The record of a sample: cheap to make, as every rank of a pipeline makes it."""

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        """By (epoch, index), as `EpochSampler` asks, or by index in epoch 0, as other samplers do."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sample(epoch, index)


class SampleList(PipelineDataset):
    """The same samples in every epoch, for evaluation and prediction."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, epoch: int, index: int) -> Sample:
        return self.samples[index]


class PlacedDataModule(pl.LightningDataModule):
    """A DataModule that knows this process's place, under any strategy."""

    @property
    def layout(self) -> PipelineLayout:
        """In its pipeline; a pipeline of one where the strategy runs none."""
        if self.trainer is None:
            return PipelineLayout()
        return getattr(self.trainer.strategy, "pipeline_layout", PipelineLayout())

    @property
    def place(self) -> dict[str, int]:
        """Among data-parallel replicas: "num_replicas" and "rank"."""
        given = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {**given} if given else {"num_replicas": 1, "rank": 0}  # None on a single device


class PipelineDataModule(PlacedDataModule):
    """Base class of DataModules for `PipelineModule`: write `setup`, and return ``self.loader(dataset)``.

    Attributes:
        batch_size: samples per step and pipeline; every data-parallel replica has a batch of its own.
        microbatches: microbatches per batch, unless the strategy asks for another number.
        num_workers: processes per rank that decode and collate.
        seed: of the order of samples and of whatever a dataset draws.
        padding: token id to pad with.
    """

    def __init__(
        self, batch_size: int, microbatches: int, num_workers: int = 0, seed: int = 0, padding: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1 or microbatches < 1:
            raise ValueError(f"batch_size={batch_size} and microbatches={microbatches} must both be at least 1")
        self.batch_size = batch_size
        self.microbatches = microbatches
        self.num_workers = num_workers
        self.seed = seed
        self.padding = padding

    def loader(self, dataset: PipelineDataset, shuffle: bool = False) -> "DataLoader[Batch]":
        """Batches of a dataset, in an order that depends on the seed, the epoch and the number of replicas alone; a run
        that is resumed goes on with the batch that would have come."""
        layout = self.layout
        return EpochLoader.of(
            dataset,
            uncounted=uncounted_in(self.trainer),
            batch_size=self.batch_size,
            sampler=EpochSampler(
                dataset,
                shuffle=shuffle,
                seed=self.seed,
                num_replicas=self.place["num_replicas"],
                rank=self.place["rank"],
            ),
            collate_fn=Collator(layout, layout.microbatches or self.microbatches, self.padding),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
