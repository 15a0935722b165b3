"""What all DataModules share: datasets of samples, the sampler, the collate function, and this process's ranks.

The same DataModule serves strategy="auto", "ddp" and "bigmac": a strategy that runs pipelines tells it the ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from bigmac_lightning.checkpoints.resuming import uncounted_in
from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.module import PipelineModule

from .example import Example
from .loading.collate import Collator, Sample
from .loading.sampler import EpochLoader, EpochSampler


class PipelineDataset(Dataset, ABC):
    """Samples by epoch and index. The random parts of a sample must depend on these two, and a seed, alone."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, epoch: int, index: int) -> Sample:
        """The record of a sample. Every rank of a pipeline makes it, so it must be cheap to make."""

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        """The sample at (epoch, index), as `EpochSampler` asks, or at an index of epoch 0, as other samplers do."""
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


class ParallelDataModule(pl.LightningDataModule):
    """A DataModule that knows this process's ranks, under any strategy."""

    @property
    def layout(self) -> PipelineLayout:
        """This process's place in its pipeline; without pipelines, a pipeline of one process."""
        if self.trainer is None:
            return PipelineLayout()
        return getattr(self.trainer.strategy, "pipeline_layout", PipelineLayout())

    @property
    def typical_amounts(self) -> Mapping[str, Any]:
        """What a microbatch holds, as far as that is known before any data are read, by names of `TypicalMicrobatch`.
        A training estimates the costs of its first batches from it; empty: it guesses them."""
        return {}

    def check(self, module: PipelineModule) -> None:
        """Check what can be checked before data and weights are read. `bigmac fit` and others call it before they start
        processes.

        Raises:
            ValueError: the model cannot take the batches, or data are missing.
        """

    @property
    def data_parallel(self) -> dict[str, int]:
        """The number of data-parallel replicas, "num_replicas", and the "rank" of this process's replica."""
        given = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {**given} if given else {"num_replicas": 1, "rank": 0}  # Lightning has None on a single device

    # -- what a trained model is asked, see `bigmac_lightning.load` ----------------------------------------------------

    reply_tokens: int = 256
    """The number of tokens after which a reply is cut off, unless the caller has another."""

    def prompt(self, example: Example) -> Batch:
        """A batch of one sample, which ends where the model is to reply to a conversation; with a target, where a
        generator is to draw, whose file is not read.

        Raises:
            ValueError: this DataModule makes no prompts.
        """
        raise ValueError(
            f"{type(self).__name__} has no method `prompt`, with which a trained model can be asked something: define "
            "it, and `reply` and `reply_ends`"
        )

    def reply(self, tokens: Sequence[int]) -> str:
        """The text of tokens that the model has written."""
        raise ValueError(f"{type(self).__name__} has no method `reply`, which makes a text of tokens: define it")

    def reply_ends(self) -> Collection[int]:
        """The tokens that end a reply."""
        return ()


class PipelineDataModule(ParallelDataModule):
    """Base class of DataModules for `PipelineModule`. Write `setup`, and loaders that return ``self.loader(dataset)``.

    Attributes:
        batch_size: number of samples per step and pipeline; every data-parallel replica has a batch of its own.
        microbatches: number of microbatches per batch, unless the strategy sets it.
        num_workers: number of processes per rank that decode and collate.
        seed: of the order of samples, and of the random numbers of a dataset.
        padding: token id of the padding.
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
        """Batches of a dataset, in an order that depends only on the seed, the epoch and the number of replicas. A run
        that is resumed continues with the batch that would have come next."""
        layout, data_parallel = self.layout, self.data_parallel
        return EpochLoader.of(
            dataset,
            uncounted=uncounted_in(self.trainer),
            batch_size=self.batch_size,
            sampler=EpochSampler(
                dataset,
                shuffle=shuffle,
                seed=self.seed,
                num_replicas=data_parallel["num_replicas"],
                rank=data_parallel["rank"],
            ),
            collate_fn=Collator(layout, layout.microbatches or self.microbatches, self.padding),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
