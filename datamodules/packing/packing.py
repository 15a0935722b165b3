"""Which samples go into which microbatch, of which step, on which replica, decided from their sizes alone.

All functions are pure: every process computes the same answer. A *bin* is the list of the samples of one microbatch, by
their indices in the order of the epoch.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from itertools import accumulate, pairwise

import numpy as np

Bin = list[int]

UNIT = 1_000_000
"""The integer load of a replica that has its fair part of a step."""

SWAPS, PARTNERS = 8, 8
"""Bins that a replica of a step swaps at most, on average, and the replicas among which a partner is looked for."""


def mix(
    sizes: Sequence[int], weights: Sequence[float] | None, samples: int | None, seed: int, epoch: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The order of the samples of several sources in an epoch.

    Each source is read in passes, each of which has a new order. An epoch continues the pass in which the last one
    stopped, so that no sample is drawn twice before all samples of its source have been drawn.

    Args:
        sizes: number of samples of each source.
        weights: relative frequency of each source; ``None``: the sizes.
        samples: length of the epoch; ``None``: the sum of the sizes.
        shuffle: whether the order is random. Otherwise sources keep their order, and are interleaved evenly.

    Returns: for each sample of the epoch its source, and its index in it.
    """
    samples = sum(sizes) if samples is None else samples
    counts = apportion(samples, sizes if weights is None else weights)
    parts: list[np.ndarray] = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        numbers, indices = np.divmod(np.arange(count) + (epoch * count if shuffle else 0), size)
        for number in range(int(numbers[0]), int(numbers[-1]) + 1) if shuffle and count else ():
            own = numbers == number
            indices[own] = _shuffled(size, f"{seed}/{source}/{number}")[indices[own]]
        parts.append(indices)
    sources, indices = np.repeat(np.arange(len(sizes)), counts), np.concatenate(parts)
    if shuffle:
        order = _shuffled(samples, f"{seed}/order/{epoch}")
    else:
        places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        order = np.lexsort((sources, places))
    return sources[order], indices[order]


def _shuffled(number: int, seed: str) -> np.ndarray:
    """The numbers below another one in a random order, by a generator whose numbers no version of numpy changes."""
    words = np.frombuffer(hashlib.sha256(seed.encode()).digest(), dtype="<u4")
    return np.random.RandomState(words).permutation(number)


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights whose sum is the total, by the largest-remainder method."""
    whole = sum(weights)
    exact = [total * weight / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def llm_cost(tokens: int, attention_tokens: float) -> float:
    """The LLM's cost of a sample, in tokens of a short one: attention adds a term that is quadratic in its length."""
    return tokens + tokens * tokens / attention_tokens


class Bins:
    """Bins that are filled by best fit: each sample goes into the fullest bin that has room for it.

    Args:
        budget: maximum number of tokens in a bin.
        ordered: whether samples keep their order: only the last bin is filled (next fit).

    Attributes:
        bins: all bins, in the order in which they were opened.
    """

    def __init__(self, budget: int, ordered: bool = False) -> None:
        self.budget, self.ordered = budget, ordered
        self.bins: list[Bin] = []
        self._rooms: list[tuple[int, int]] = []  # sorted (free tokens, bin); only the last bin if the order is kept

    def add(self, sample: int, tokens: int, may_open: bool = True) -> bool:
        """Add a sample.

        Args:
            sample: its index.
            tokens: its length.
            may_open: whether a new bin may be opened for it.

        Returns: whether the sample was added.
        """
        at = bisect_left(self._rooms, (tokens, -1))
        if at < len(self._rooms):
            room, b = self._rooms.pop(at)
        elif may_open:
            self.bins.append([])
            room, b = self.budget, len(self.bins) - 1
        else:
            return False
        self.bins[b].append(sample)
        if self.ordered:
            self._rooms.clear()
        insort(self._rooms, (room - tokens, b))
        return True


def pack(
    tokens: Sequence[int], costs: Sequence[float], budget: int, buffer_size: int, ordered: bool = False
) -> list[Bin]:
    """Bins of at most `budget` tokens each.

    Args:
        tokens: length of each sample; at most `budget`.
        costs: the LLM's cost of each sample.
        buffer_size: number of consecutive samples that are packed together: by best-fit decreasing, and then as evenly
            in cost as the same number of bins allows.
        ordered: whether samples keep their order; a bin then ends where the next sample does not fit.
    """
    if ordered:
        filled = Bins(budget, ordered)
        for i, size in enumerate(tokens):
            filled.add(i, size)
        return filled.bins
    bins: list[Bin] = []
    for start in range(0, len(tokens), buffer_size):
        filled = Bins(budget)
        buffer = range(start, min(start + buffer_size, len(tokens)))
        for i in sorted(buffer, key=lambda i: (-tokens[i], i)):
            filled.add(i, tokens[i])
        bins += _even(filled.bins, tokens, costs, budget)
    return bins


def _even(packed: list[Bin], tokens: Sequence[int], costs: Sequence[float], budget: int) -> list[Bin]:
    """The samples in as many bins of nearly equal cost: each sample, costliest first, goes into the cheapest bin that
    has room for it. If the budget does not allow that, `packed` is returned."""
    bins: list[Bin] = [[] for _ in packed]
    rooms = [budget] * len(bins)
    cheapest = [(0.0, b) for b in range(len(bins))]  # a heap
    for i in sorted((i for b in packed for i in b), key=lambda i: (-costs[i], i)):
        full: list[tuple[float, int]] = []
        while cheapest and rooms[cheapest[0][1]] < tokens[i]:
            full.append(heappop(cheapest))
        if not cheapest:
            return packed
        load, b = cheapest[0]
        bins[b].append(i)
        rooms[b] -= tokens[i]
        heapreplace(cheapest, (load + costs[i], b))
        for entry in full:
            heappush(cheapest, entry)
    return bins


def deal(
    bins: Sequence[Bin],
    costs: Sequence[float],
    replicas: int,
    microbatches: int,
    steps: int | None = None,
    exact: bool = False,
    further: Sequence[Sequence[float]] = (),
) -> list[list[list[Bin]]]:
    """Deal bins to steps and replicas. In a step all replicas have equally many bins, of nearly equal total cost.

    If there are too few bins, bins of several samples are split in two; if there are too few samples, bins are
    repeated.

    Args:
        costs: the LLM's cost of each sample.
        microbatches: number of bins of a replica in a step.
        steps: number of steps; ``None``: as many as the bins need. Steps differ by one microbatch if the number of bins
            does not divide evenly.
        exact: every step has exactly `microbatches` bins per replica; if `steps` is given, bins beyond that are left
            out.
        further: other kinds of costs of each sample, such as those of the encoder, each in a unit of its own. Replicas
            get nearly equal ones of each kind, as nobody knows yet how the kinds compare.

    Returns: per step, per replica, its bins.
    """
    if not bins:
        return []
    if steps is None:
        steps = -(-len(bins) // (replicas * microbatches))
    number = steps * replicas * microbatches if exact else replicas * max(steps, -(-len(bins) // replicas))
    bins = _resize(list(bins), costs, number)
    bounds = [replicas * (s * (number // replicas) // steps) for s in range(steps + 1)]
    return [_share(bins[a:b], (costs, *further), replicas) for a, b in pairwise(bounds)]


def _resize(bins: list[Bin], costs: Sequence[float], number: int) -> list[Bin]:
    """Exactly `number` bins: the first ones, or all, of which the costliest are split or all are repeated."""
    bins = bins[:number]
    while len(bins) < number:
        at = max(range(len(bins)), key=lambda b: (len(bins[b]) > 1, sum(costs[i] for i in bins[b])))
        if len(bins[at]) == 1:
            return [bins[b % len(bins)] for b in range(number)]
        half = _half(bins[at], costs)
        bins[at : at + 1] = [bins[at][:half], bins[at][half:]]
    return bins


def _half(samples: Bin, costs: Sequence[float]) -> int:
    """The index at which a bin is split so that both parts cost about as much."""
    sums = list(accumulate(costs[i] for i in samples))
    return min(range(1, len(samples)), key=lambda k: abs(2 * sums[k - 1] - sums[-1]))


def _share(bins: Sequence[Bin], kinds: Sequence[Sequence[float]], replicas: int) -> list[list[Bin]]:
    """Equally many bins for each replica: each bin, costliest first, goes to a replica that then has the lowest load;
    then the replica with the highest load swaps bins with others as long as that helps. The bins of a replica keep
    their order.

    Loads are integers, so that all machines of a run add them up to the same.
    """
    if replicas == 1:
        return [list(bins)]
    costs = [[sum(kind[i] for i in b) for kind in kinds] for b in bins]
    totals = [sum(column) for column in zip(*costs, strict=True)]
    fair = [total / replicas for total in totals]  # of each kind, the load of a replica that is to become `UNIT`
    rows = [[round(UNIT * c / f) if f else 0 for c, f in zip(row, fair, strict=True)] for row in costs]
    loads, each = np.array(rows, dtype=np.int64), len(bins) // replicas
    shares: list[list[int]] = [[] for _ in range(replicas)]
    sums = np.zeros((replicas, len(kinds)), dtype=np.int64)
    for b in sorted(range(len(bins)), key=lambda b: (-sum(rows[b]), b)):
        free = [r for r in range(replicas) if len(shares[r]) < each]
        after = (sums[free] + loads[b]).max(1)
        r = free[int(after.argmin())]
        shares[r].append(b)
        sums[r] += loads[b]
    _swap(shares, sums, loads)
    return [[bins[b] for b in sorted(part)] for part in shares]


def _swap(shares: list[list[int]], sums: np.ndarray, loads: np.ndarray) -> None:
    """Swap bins of the replica with the highest load, in place.

    Args:
        shares: the bins of each replica.
        sums: (replicas, kinds), their loads.
        loads: (bins, kinds).
    """
    for _ in range(SWAPS * len(shares)):
        heavy, kind = np.unravel_index(int(sums.argmax()), sums.shape)
        highest = sums[heavy, kind]
        for light in np.argsort(sums[:, kind], kind="stable")[:PARTNERS].tolist():
            if light == heavy:
                continue
            moved = loads[shares[heavy]][:, None] - loads[shares[light]][None]
            after = np.maximum((sums[heavy] - moved).max(-1), (sums[light] + moved).max(-1))
            i, j = divmod(int(after.argmin()), after.shape[1])
            if after[i, j] < highest:
                shares[heavy][i], shares[light][j] = shares[light][j], shares[heavy][i]
                sums[heavy] -= moved[i, j]
                sums[light] += moved[i, j]
                break
        else:
            return
