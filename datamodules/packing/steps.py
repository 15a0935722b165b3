"""The sampler behind `MultimodalDataModule`: what each step of an epoch consists of, from any step on.

Knows measurements, epochs and replicas as numbers; knows nothing of samples' contents.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from ..options import PackingOptions
from .measuring import Measurements
from .packing import deal, llm_cost, mix, pack


@dataclass(frozen=True)
class StepSize:
    """How much a replica trains on in a step.

    Attributes:
        token_budget: maximum number of tokens in a microbatch.
        microbatches: number of microbatches in a step.
        exact: every step has exactly this number of microbatches; otherwise some steps may have one more.
    """

    token_budget: int
    microbatches: int
    exact: bool = False


@dataclass(frozen=True)
class Step:
    """What a replica has to do in a step.

    Attributes:
        epoch: that it belongs to.
        bins: (source, example) pairs of each microbatch.
    """

    epoch: int
    bins: list[list[tuple[int, int]]]


@dataclass
class _Order:
    """The steps of one epoch, for all replicas."""

    epoch: int
    picks: list[tuple[int, int]]
    steps: list[list[list[list[int]]]] = field(default_factory=list)


class StepSampler(DistributedSampler):
    """Yields the `Step`s of one replica. Lightning leaves a `DistributedSampler` alone and tells it the epoch.

    Attributes:
        start: first step that the next iterator yields; the ones after it begin with the first.
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
    ) -> None:
        """
        Args:
            measured: the measurements of each source; examples with errors are left out.
            weights, samples: as in `packing.mix`.
            same: every epoch repeats the first one.
        """
        self.usable = [np.flatnonzero(m.tokens) for m in measured]
        if not measured or not all(map(len, self.usable)):
            raise ValueError("a split needs sources, and each source a usable example")
        super().__init__(range(1), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # pyright: ignore
        self.measured, self.size, self.packing = list(measured), size, packing
        self.weights, self.samples = weights, samples
        self.start, self.same = 0, same
        self._order: _Order | None = None
        self._length: int | None = None

    def __len__(self) -> int:
        """Steps of an epoch; all epochs have as many as the first."""
        if self._length is None:
            self._length = len(self._plan(0, None).steps)
        return self._length

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(0 if self.same else epoch)

    def __iter__(self) -> Iterator[Any]:
        order = self._of(self.epoch)
        first, self.start = self.start, 0
        for step in order.steps[first:]:
            bins = [[order.picks[i] for i in b] for b in step[self.rank]]
            yield Step(self.epoch, bins)

    def fingerprint(self) -> str:
        """A hash of everything that the order of steps depends on, except the number of replicas."""
        packing = self.packing
        options = (self.size, packing.buffer_size, packing.ordered, packing.attention_tokens)
        state = hashlib.sha256(repr((options, self.weights, self.samples, self.shuffle, self.seed)).encode())
        for m in self.measured:
            state.update(m.tokens.tobytes())
        return state.hexdigest()[:16]

    def _of(self, epoch: int) -> _Order:
        if self._order is None or self._order.epoch != epoch:
            self._order = self._plan(epoch, len(self))
        return self._order

    def _plan(self, epoch: int, steps: int | None) -> _Order:
        size, packing = self.size, self.packing
        picks = mix([len(u) for u in self.usable], self.weights, self.samples, self.seed, epoch, self.shuffle)
        picks = [(source, int(self.usable[source][index])) for source, index in picks]
        tokens = [int(self.measured[source].tokens[index]) for source, index in picks]
        costs = [llm_cost(n, packing.attention_tokens) for n in tokens]
        bins = pack(tokens, costs, size.token_budget, packing.buffer_size, packing.ordered)
        if self.shuffle and not packing.ordered:
            random.Random(f"{self.seed}/bins/{epoch}").shuffle(bins)
        return _Order(epoch, picks, deal(bins, costs, self.num_replicas, size.microbatches, steps, size.exact))
