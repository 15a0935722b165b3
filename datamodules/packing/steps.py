"""The sampler of `MultimodalDataModule`: it yields what each step of an epoch consists of, from any step on."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from ..kept_arrays import made_once
from ..options import PackingOptions
from .epoch import EpochSteps, Pick, Samples, StepSize, numbers_of_bins
from .measuring import Measurements
from .order import Order

MANY = 200_000
"""Samples of an epoch from which on the numbers of bins of its buffers are kept on disk. Others are counted sooner than
found."""

ORDER = 3
"""Version of the order of samples; a change of how they are packed or dealt needs another one."""


def order_settings(size: StepSize, packing: PackingOptions) -> tuple[object, ...]:
    """The settings that the order of samples depends on. `packed`, for one, changes the shapes of a batch alone."""
    return ORDER, size, packing.buffer_size, packing.ordered, packing.attention_tokens


@dataclass(frozen=True)
class Step:
    """A step of a replica.

    Attributes:
        epoch: the epoch that it belongs to.
        bins: for each microbatch the (source, example) pairs of its samples.
    """

    epoch: int
    bins: list[list[Pick]]


class StepSampler(DistributedSampler):
    """Yields the `Step`s of one replica.

    It is a `DistributedSampler` because Lightning does not replace one, and sets its epoch.

    Attributes:
        start: the first step that the next iterator yields; iterators after it begin with step 0.
    """

    def __init__(
        self,
        measured: Sequence[Measurements],
        size: StepSize,
        packing: PackingOptions,
        weights: Sequence[float] | None = None,
        samples: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        same: bool = False,
        kept_in: Path | None = None,
    ) -> None:
        """
        Args:
            measured: the measurements of each source; examples with errors are left out.
            weights, samples: see `Order`.
            same: every epoch repeats the first one.
            kept_in: the folder in which it is kept how many bins the samples of an epoch fill; ``None``: nowhere.
        """
        self.usable = [m.number_usable for m in measured]
        if not measured or not all(self.usable):
            raise ValueError(f"a split needs sources, and each source a usable example; they have {self.usable}")
        super().__init__(range(1), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # pyright: ignore
        self.measured, self.size, self.packing = list(measured), size, packing
        self.weights, self.samples, self.kept_in = weights, samples, kept_in
        self.start, self.same = 0, same
        self._planned: tuple[int, EpochSteps] | None = None
        self._length: int | None = None
        self._fingerprint = ""

    def __len__(self) -> int:
        """Number of steps of an epoch: that of the first epoch."""
        if self._length is None:
            self._length = len(self._steps(0, None))
        return self._length

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(0 if self.same else epoch)

    def __iter__(self) -> Iterator[Any]:
        steps, epoch = self._steps(self.epoch, len(self)), self.epoch
        first, self.start = self.start, 0
        for number in range(first, len(steps)):
            yield Step(epoch, steps[number][self.rank])

    def fingerprint(self) -> str:
        """A hash of everything that the order of steps depends on, except the number of replicas."""
        if not self._fingerprint:
            settings = (order_settings(self.size, self.packing), self.weights, self.samples, self.shuffle, self.seed)
            state = hashlib.sha256(repr(settings).encode())
            for m in self.measured:
                state.update(m.tokens.data)
            self._fingerprint = state.hexdigest()[:16]
        return self._fingerprint

    def _steps(self, epoch: int, steps: int | None) -> EpochSteps:
        """The steps of an epoch; ``None``: of the first one, which has as many steps as its bins need."""
        if self._planned is None or self._planned[0] != epoch:
            order = Order(self.usable, self.weights, self.samples, self.seed, epoch, self.shuffle)
            samples = Samples(self.measured, order)
            seed = f"{self.seed}/bins/{epoch}" if self.shuffle and not self.packing.ordered else None
            bins = self._numbers_of_bins(samples, epoch)
            made = EpochSteps(samples, bins, self.size, self.packing, self.num_replicas, steps, seed)
            self._planned = epoch, made
        return self._planned[1]

    def _numbers_of_bins(self, samples: Samples, epoch: int) -> np.ndarray:
        def made() -> dict[str, np.ndarray]:
            return {"bins": numbers_of_bins(samples, self.size.token_budget, self.packing)}

        if self.kept_in is None or len(samples) < MANY:
            return made()["bins"]
        place = self.kept_in / f"bins-{self.fingerprint()}-{epoch}.safetensors"
        return made_once(place, ["bins"], made, "The numbers of bins of an epoch")["bins"]
