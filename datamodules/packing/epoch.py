"""The steps of an epoch, each of which is found without the others: only numbers of bins are known of all of it.

The samples of an epoch, in its order, are cut into buffers. The samples of a buffer are packed together, when one of
its bins is needed. Bins have numbers through the whole epoch, so a step is a range of bins, of one or several buffers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..options import PackingOptions
from .measuring import Measurements
from .order import Order, apportion
from .packing import llm_cost, number_of_bins, pack, resized, share

Pick = tuple[int, int]
"""The number of a source, and that of an example of it."""

COUNTED = 64
"""Buffers whose samples are looked up at once."""


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


class Samples:
    """The samples of an epoch, in its order; examples that cannot be used are left out.

    Args:
        measured: the measurements of each source.
        order: of their usable examples.
    """

    def __init__(self, measured: Sequence[Measurements], order: Order) -> None:
        self._measured, self._order = measured, order

    def __len__(self) -> int:
        return len(self._order)

    def part(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The source (n,) and the number of the example (n,) of each of the samples from `start` up to `stop`."""
        sources, examples = self._order.part(start, stop)
        for source, measured in enumerate(self._measured):
            own = sources == source
            examples[own] = measured.usable(examples[own])
        return sources, examples

    def measured(self, name: str, sources: np.ndarray, examples: np.ndarray) -> np.ndarray:
        """An array of `Measurements` of samples (n,)."""
        found = np.empty(len(sources), self._measured[0].arrays[name].dtype)
        for source, measured in enumerate(self._measured):
            own = sources == source
            found[own] = measured.arrays[name][examples[own]]
        return found


def bounds_of_buffers(samples: int, buffer_size: int) -> np.ndarray:
    """(buffers + 1,) Where buffers of nearly equal size begin, of at most `buffer_size` samples each."""
    buffers = -(-samples // buffer_size)
    return np.arange(buffers + 1) * samples // max(1, buffers)


def numbers_of_bins(samples: Samples, budget: int, packing: PackingOptions) -> np.ndarray:
    """(buffers,) How many bins the samples of each buffer fill. It takes a second per million samples."""
    bounds = bounds_of_buffers(len(samples), packing.buffer_size)
    numbers: list[int] = []
    for first in range(0, len(bounds) - 1, COUNTED):
        cuts = bounds[first : first + COUNTED + 1]
        tokens = samples.measured("tokens", *samples.part(int(cuts[0]), int(cuts[-1])))
        for own in np.split(tokens, cuts[1:-1] - cuts[0]):
            numbers.append(number_of_bins(own, budget, packing.ordered))
    return np.array(numbers, np.int64)


@dataclass(frozen=True)
class _Buffer:
    """
    Attributes:
        number: of the buffer.
        bins: the indices of the samples of each bin.
        picks: of each sample.
        kinds: for each kind of cost, that of each sample: the LLM's, the encoders', the generators'.
    """

    number: int
    bins: list[list[int]]
    picks: list[Pick]
    kinds: list[list[float]]


class EpochSteps:
    """The steps of an epoch, by number: per replica the bins of a step, each of `Pick`s.

    In a step all replicas have equally many bins, of nearly equal cost. If the last step lacks bins, some bins are
    split in two; if there are too few samples for that, bins are repeated.
    """

    def __init__(
        self,
        samples: Samples,
        numbers: np.ndarray,
        size: StepSize,
        packing: PackingOptions,
        replicas: int,
        steps: int | None,
        seed: str | None,
    ) -> None:
        """
        Args:
            numbers: (buffers,) see `numbers_of_bins`.
            steps: number of steps; ``None``: as many as the bins need. If it is given and every step has an exact
                number of bins, bins beyond that are left out.
            seed: of the order of the bins of a buffer; ``None``: they keep their order.
        """
        self._samples, self._size, self._packing, self._replicas, self._seed = samples, size, packing, replicas, seed
        self._bounds = bounds_of_buffers(len(samples), packing.buffer_size)
        total, each = int(numbers.sum()), replicas * size.microbatches
        self._steps = -(-total // each) if steps is None else steps
        self._bins = self._steps * each if size.exact else replicas * max(self._steps, -(-total // replicas))
        # bins are split evenly over the buffers that have bins of several samples
        splits = np.diff(self._bounds) - numbers
        lacking = min(self._bins - total, int(splits.sum()))
        if lacking > 0:
            numbers = numbers + np.array(apportion(lacking, splits.tolist()), np.int64)
        self._ends = np.cumsum(numbers)
        self._last: _Buffer | None = None

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> list[list[list[Pick]]]:
        per_replica = self._bins // self._replicas
        first, last = (self._replicas * (s * per_replica // self._steps) for s in (step, step + 1))
        picks: list[Pick] = []
        kinds: list[list[float]] = [[], [], []]
        bins: list[list[int]] = []
        for number in range(first, last):
            buffer, own = self._bin(number)
            bins.append(list(range(len(picks), len(picks) + len(own))))
            picks += [buffer.picks[i] for i in own]
            for kind, costs in zip(kinds, buffer.kinds, strict=True):
                kind += [costs[i] for i in own]
        return [[[picks[i] for i in b] for b in part] for part in share(bins, kinds, self._replicas)]

    def _bin(self, number: int) -> tuple[_Buffer, list[int]]:
        number %= int(self._ends[-1])  # with too few samples, bins are repeated
        at = int(np.searchsorted(self._ends, number, side="right"))
        if self._last is None or self._last.number != at:
            self._last = self._packed(at)
        return self._last, self._last.bins[number - int(self._ends[at])]  # counted from the end

    def _packed(self, number: int) -> _Buffer:
        sources, examples = self._samples.part(*self._bounds[number : number + 2].tolist())
        tokens, encoder, target = (
            self._samples.measured(name, sources, examples).tolist() for name in ("tokens", "encoder", "target")
        )
        costs = [llm_cost(n, self._packing.attention_tokens) for n in tokens]
        bins = pack(tokens, costs, self._size.token_budget, self._packing.ordered)
        bins = resized(bins, costs, int(self._ends[number]) - (int(self._ends[number - 1]) if number else 0))
        if self._seed is not None:
            random.Random(f"{self._seed}/{number}").shuffle(bins)
        picks = list(zip(sources.tolist(), examples.tolist(), strict=True))
        return _Buffer(number, bins, picks, [costs, encoder, target])
