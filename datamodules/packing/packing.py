"""Which samples go into which microbatch, in which step, on which replica: from their sizes alone.

Pure functions of numbers: every process gets the same answer. Knows nothing of samples' contents, files or ranks.

A *bin* is the list of samples of one microbatch, by their positions in the order of the epoch.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate, pairwise

Bin = list[int]


def mix(
    sizes: Sequence[int], weights: Sequence[float] | None, samples: int | None, seed: int, epoch: int, shuffle: bool
) -> list[tuple[int, int]]:
    """The order of an epoch over several sources.

    A source is gone through in a new order each time it is finished, and an epoch goes on where the one before stopped:
    nothing is drawn twice before everything has been drawn.

    Args:
        sizes: number of samples of each source.
        weights: shares of the epoch; ``None``: in proportion to the sizes.
        samples: length of the epoch; ``None``: that of all sources together.
        shuffle: else sources keep their order, and are interleaved evenly.

    Returns: (source, sample of it) pairs.
    """
    samples = sum(sizes) if samples is None else samples
    counts = apportion(samples, sizes if weights is None else weights)
    picks: list[tuple[float, int, int]] = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        first = epoch * count if shuffle else 0
        passes: dict[int, list[int]] = {}
        for i in range(count):
            turn, place = divmod(first + i, size)
            if turn not in passes:
                passes[turn] = list(range(size))
                if shuffle:
                    random.Random(f"{seed}/{source}/{turn}").shuffle(passes[turn])
            picks.append(((i + 0.5) / count, source, passes[turn][place]))
    picks.sort(key=lambda pick: pick[:2])
    order = [(source, index) for _, source, index in picks]
    if shuffle:
        random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return order


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of a total, by largest remainder."""
    whole = sum(weights)
    exact = [total * weight / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def llm_cost(tokens: int, attention_tokens: float) -> float:
    """What a sample costs the LLM, in tokens of a short one; attention as of `PackingOptions`."""
    return tokens + tokens * tokens / attention_tokens


def pack(tokens: Sequence[int], costs: Sequence[float], budget: int, window: int, ordered: bool = False) -> list[Bin]:
    """Bins of at most `budget` tokens each.

    Args:
        tokens: of each sample; none more than `budget`.
        costs: LLM time of each sample, attention counted.
        window: samples that are packed together: best-fit decreasing, then as evenly in cost as the same number of bins
            allows.
        ordered: keep the order of samples; a bin ends where the next sample does not fit.
    """
    if ordered:
        return _next_fit(tokens, budget)
    bins: list[Bin] = []
    for start in range(0, len(tokens), window):
        pool = range(start, min(start + window, len(tokens)))
        bins += _even(_best_fit(pool, tokens, budget), tokens, costs, budget)
    return bins


def _next_fit(tokens: Sequence[int], budget: int) -> list[Bin]:
    bins: list[Bin] = []
    room = 0
    for i, size in enumerate(tokens):
        if size > room:
            bins.append([])
            room = budget
        bins[-1].append(i)
        room -= size
    return bins


def _best_fit(pool: Sequence[int], tokens: Sequence[int], budget: int) -> list[Bin]:
    """Best-fit decreasing: each sample, longest first, into the fullest bin that has room for it."""
    bins: list[Bin] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), sorted
    for i in sorted(pool, key=lambda i: (-tokens[i], i)):
        at = bisect_left(rooms, (tokens[i], -1))
        if at == len(rooms):
            bins.append([])
            room, b = budget, len(bins) - 1
        else:
            room, b = rooms.pop(at)
        bins[b].append(i)
        insort(rooms, (room - tokens[i], b))
    return bins


def _even(packed: list[Bin], tokens: Sequence[int], costs: Sequence[float], budget: int) -> list[Bin]:
    """As many bins of nearly equal cost: each sample, dearest first, into the cheapest bin that has room for it. Or
    `packed` as it is, where the budget does not allow that."""
    bins: list[Bin] = [[] for _ in packed]
    loads, rooms = [0.0] * len(bins), [budget] * len(bins)
    for i in sorted((i for b in packed for i in b), key=lambda i: (-costs[i], i)):
        possible = [b for b in range(len(bins)) if rooms[b] >= tokens[i]]
        if not possible:
            return packed
        b = min(possible, key=lambda b: loads[b])
        bins[b].append(i)
        loads[b] += costs[i]
        rooms[b] -= tokens[i]
    return bins


def deal(
    bins: Sequence[Bin],
    costs: Sequence[float],
    replicas: int,
    microbatches: int,
    steps: int | None = None,
    exact: bool = False,
) -> list[list[list[Bin]]]:
    """Bins to steps and replicas: in a step every replica has equally many microbatches, of nearly equal total cost.

    Bins of several samples are cut in two until the numbers work out; where there are too few samples for that, bins
    are repeated.

    Args:
        costs: LLM time of each sample.
        microbatches: of a replica in a step.
        steps: how many to make; ``None``: as many as the bins need. Steps differ by one microbatch where the bins do
            not suffice or are too many.
        exact: every step has exactly `microbatches`; with `steps` given, bins beyond that are left out.

    Returns: per step, per replica, its bins.
    """
    if not bins:
        return []
    if steps is None:
        steps = -(-len(bins) // (replicas * microbatches))
    number = steps * replicas * microbatches if exact else replicas * max(steps, -(-len(bins) // replicas))
    bins = _cut(list(bins), costs, number)
    bounds = [replicas * (s * (number // replicas) // steps) for s in range(steps + 1)]
    return [_share(bins[a:b], costs, replicas) for a, b in pairwise(bounds)]


def _cut(bins: list[Bin], costs: Sequence[float], number: int) -> list[Bin]:
    """Exactly `number` bins."""
    bins = bins[:number]
    while len(bins) < number:
        at = max(range(len(bins)), key=lambda b: (len(bins[b]) > 1, sum(costs[i] for i in bins[b])))
        if len(bins[at]) == 1:
            return [bins[b % len(bins)] for b in range(number)]
        half = _half(bins[at], costs)
        bins[at : at + 1] = [bins[at][:half], bins[at][half:]]
    return bins


def _half(samples: Bin, costs: Sequence[float]) -> int:
    """Where to cut a bin so that both parts cost about as much."""
    sums = list(accumulate(costs[i] for i in samples))
    return min(range(1, len(samples)), key=lambda k: abs(2 * sums[k - 1] - sums[-1]))


def _share(bins: Sequence[Bin], costs: Sequence[float], replicas: int) -> list[list[Bin]]:
    """Equally many bins for each replica; dearest first, each to the replica that has least and room. Bins of a replica
    keep their order."""
    each = len(bins) // replicas
    cost = [sum(costs[i] for i in b) for b in bins]
    mine: list[list[int]] = [[] for _ in range(replicas)]
    load = [0.0] * replicas
    for b in sorted(range(len(bins)), key=lambda b: (-cost[b], b)):
        r = min((r for r in range(replicas) if len(mine[r]) < each), key=lambda r: load[r])
        mine[r].append(b)
        load[r] += cost[b]
    return [[bins[b] for b in sorted(part)] for part in mine]
