"""Which samples go into which microbatch, of which step, on which replica, decided from their sizes alone.

All functions are pure: every process computes the same answer. A *bin* is the list of the samples of one microbatch, by
their indices in a list of samples.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from itertools import accumulate

import numpy as np

Bin = list[int]

UNIT = 1_000_000
"""The integer load of a replica that has its fair part of a step."""

SWAPS, PARTNERS = 8, 8
"""Bins that a replica of a step swaps at most, on average, and the replicas among which a partner is looked for."""


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


def pack(tokens: Sequence[int], costs: Sequence[float], budget: int, ordered: bool = False) -> list[Bin]:
    """Bins of at most `budget` tokens each: by best-fit decreasing, and then as evenly in cost as the same number of
    bins allows.

    Args:
        tokens: length of each sample; at most `budget`.
        costs: the LLM's cost of each sample.
        ordered: whether samples keep their order; a bin then ends where the next sample does not fit.
    """
    filled = Bins(budget, ordered)
    for i in range(len(tokens)) if ordered else sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        filled.add(i, tokens[i])
    return filled.bins if ordered else _even(filled.bins, tokens, costs, budget)


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


def number_of_bins(tokens: np.ndarray, budget: int, ordered: bool) -> int:
    """How many bins `pack` makes of one buffer, without making them.

    Args:
        tokens: (samples,) of the buffer.
    """
    if ordered:
        ends, at, number = np.cumsum(tokens), 0, 0
        while at < len(ends):
            filled = budget + (int(ends[at - 1]) if at else 0)
            at, number = max(at + 1, int(np.searchsorted(ends, filled, side="right"))), number + 1
        return number
    rooms: list[int] = []
    number, least = 0, int(tokens.min(initial=budget))
    for size in np.sort(tokens)[::-1].tolist():
        at = bisect_left(rooms, size)
        if at == len(rooms):
            number += 1
            room = budget - size
        else:
            room = rooms.pop(at) - size
        if room >= least:
            insort(rooms, room)
    return number


def deal(
    bins: Sequence[Bin],
    costs: Sequence[float],
    replicas: int,
    microbatches: int,
    further: Sequence[Sequence[float]] = (),
) -> list[list[list[Bin]]]:
    """Deal bins to as many steps as they need, and to replicas; see `resized` and `share`.

    Args:
        costs: the LLM's cost of each sample.
        microbatches: number of bins of a replica in a step.
        further: other kinds of costs of each sample.

    Returns: per step, per replica, its bins.
    """
    each = replicas * microbatches
    bins = resized(bins, costs, -(-len(bins) // each) * each)
    return [share(bins[a : a + each], (costs, *further), replicas) for a in range(0, len(bins), each)]


def resized(bins: Sequence[Bin], costs: Sequence[float], number: int) -> list[Bin]:
    """Exactly `number` bins, or as many more as there are: the costliest bins of several samples are split in two; if
    there are too few samples, bins are repeated."""
    bins = list(bins)
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


def share(bins: Sequence[Bin], kinds: Sequence[Sequence[float]], replicas: int) -> list[list[Bin]]:
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
