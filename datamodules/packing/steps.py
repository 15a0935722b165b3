"""The sampler of `MultimodalDataModule`: it yields what each step of an epoch consists of, from any step on."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from ..options import PackingOptions
from .measuring import Measurements
from .packing import Bin, deal, llm_cost, mix, pack

ORDER = 2
"""Version of the order of samples; a change of how they are packed or dealt needs another one."""


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
    bins: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class _EpochPlan:
    """The steps of one epoch, for all replicas.

    Attributes:
        picks: for each sample of the epoch its source, and the number of its example.
        steps: per step, per replica, bins of indices of the picks.
    """

    epoch: int
    picks: tuple[np.ndarray, np.ndarray]
    steps: list[list[list[Bin]]]


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
    ) -> None:
        """
        Args:
            measured: the measurements of each source; examples with errors are left out.
            weights, samples: see `packing.mix`.
            same: every epoch repeats the first one.
        """
        self.usable = [np.flatnonzero(m.tokens) for m in measured]
        if not measured or not all(map(len, self.usable)):
            raise ValueError("a split needs sources, and each source a usable example")
        super().__init__(range(1), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # pyright: ignore
        self.measured, self.size, self.packing = list(measured), size, packing
        self.weights, self.samples = weights, samples
        self.start, self.same = 0, same
        self._epoch_plan: _EpochPlan | None = None
        self._length: int | None = None

    def __len__(self) -> int:
        """Number of steps of an epoch: that of the first epoch."""
        if self._length is None:
            plan = self._plan(0, None)
            self._length, self._epoch_plan = len(plan.steps), plan
        return self._length

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(0 if self.same else epoch)

    def __iter__(self) -> Iterator[Any]:
        plan = self._plan_of(self.epoch)
        first, self.start = self.start, 0
        for step in plan.steps[first:]:
            sources, examples = plan.picks
            bins = [[(int(sources[i]), int(examples[i])) for i in b] for b in step[self.rank]]
            yield Step(self.epoch, bins)

    def fingerprint(self) -> str:
        """A hash of everything that the order of steps depends on, except the number of replicas."""
        settings = (order_settings(self.size, self.packing), self.weights, self.samples, self.shuffle, self.seed)
        state = hashlib.sha256(repr(settings).encode())
        for m in self.measured:
            state.update(m.tokens.tobytes())
        return state.hexdigest()[:16]

    def _plan_of(self, epoch: int) -> _EpochPlan:
        steps = len(self)  # this plans the first epoch
        if self._epoch_plan is None or self._epoch_plan.epoch != epoch:
            self._epoch_plan = self._plan(epoch, steps)
        return self._epoch_plan

    def _plan(self, epoch: int, steps: int | None) -> _EpochPlan:
        size, packing = self.size, self.packing
        sizes = [len(usable) for usable in self.usable]
        sources, examples = mix(sizes, self.weights, self.samples, self.seed, epoch, self.shuffle)
        of_source = [np.flatnonzero(sources == source) for source in range(len(sizes))]
        for own, usable in zip(of_source, self.usable, strict=True):
            examples[own] = usable[examples[own]]

        def measured(name: str) -> list[Any]:
            found = np.empty(len(sources), dtype=self.measured[0].arrays[name].dtype)
            for own, measurements in zip(of_source, self.measured, strict=True):
                found[own] = measurements.arrays[name][examples[own]]
            return found.tolist()

        tokens, further = measured("tokens"), [measured("encoder"), measured("target")]
        costs = [llm_cost(n, packing.attention_tokens) for n in tokens]
        bins = pack(tokens, costs, size.token_budget, packing.buffer_size, packing.ordered)
        if self.shuffle and not packing.ordered:
            random.Random(f"{self.seed}/bins/{epoch}").shuffle(bins)
        dealt = deal(bins, costs, self.num_replicas, size.microbatches, steps, size.exact, further)
        return _EpochPlan(epoch, (sources, examples), dealt)
