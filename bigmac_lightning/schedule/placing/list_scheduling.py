"""Scheduling of tasks on ranks: each rank works off a few chains whose own orders are fixed, in any mixture.

Knows lengths, needs and chains; knows nothing of what the tasks are. Two tools, which work in both directions of time:
list scheduling with look-ahead, and justification with insertion into gaps (serial schedule generation as in
Kolisch & Hartmann 1999; a justified schedule is never longer, Valls et al. 2005).
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from math import inf

Edge = tuple[int, float]
"""Another task and the delay on the way to it."""

EPS = 1e-9


class Tasks:
    """Tasks with their lengths and needs.

    Attributes:
        lengths: how long each task takes.
        ranks: where each task runs.
        chains: per rank, the chains of its tasks in their order; the first chain is the main one.
        places: per task, the number of its chain.
        needs: per task, what must have ended, that long before; neighbours in a chain included.
        needed_by: the same the other way round.
    """

    def __init__(
        self,
        lengths: Sequence[float],
        ranks: Sequence[int],
        chains: Sequence[Sequence[Sequence[int]]],
        arcs: Iterable[tuple[int, int]],
        latency: float,
    ) -> None:
        self.lengths, self.ranks = list(lengths), list(ranks)
        self.chains = [[list(chain) for chain in row] for row in chains]
        self.places = [0] * len(self.lengths)
        for row in self.chains:
            for number, chain in enumerate(row):
                for task in chain:
                    self.places[task] = number
        self.needs: list[list[Edge]] = [[] for _ in lengths]
        self.needed_by: list[list[Edge]] = [[] for _ in lengths]
        for one, other in [*_essential(arcs, self.chains), *_links(self.chains)]:
            delay = latency if ranks[one] != ranks[other] else 0.0
            self.needs[other].append((one, delay))
            self.needed_by[one].append((other, delay))

    def mirrored(self) -> "Tasks":
        """The same tasks with time running backwards."""
        other = object.__new__(Tasks)
        other.lengths, other.ranks, other.places = self.lengths, self.ranks, self.places
        other.chains = [[chain[::-1] for chain in row] for row in self.chains]
        other.needs, other.needed_by = self.needed_by, self.needs
        return other

    def mirror(self, starts: Sequence[float]) -> list[float]:
        """Start times of the mirrored tasks from those of these tasks."""
        end = self.makespan(starts)
        return [end - start - length for start, length in zip(starts, self.lengths, strict=True)]

    def makespan(self, starts: Sequence[float]) -> float:
        """When the last task ends."""
        return max((start + length for start, length in zip(starts, self.lengths, strict=True)), default=0.0)

    def kept_by(self, starts: Sequence[float]) -> bool:
        """Whether a schedule keeps all needs and chains."""
        ends = [start + length for start, length in zip(starts, self.lengths, strict=True)]
        return all(
            ends[need] + delay <= start + EPS
            for start, needs in zip(starts, self.needs, strict=True)
            for need, delay in needs
        )

    def floor(self) -> float:
        """No schedule is shorter: every rank has to do its tasks, after what precedes all of them and before what
        follows."""
        everything = set(range(len(self.lengths)))
        heads, tails = self.earliest(everything), self.mirrored().earliest(everything)
        longest = max((h + t + n for h, t, n in zip(heads, tails, self.lengths, strict=True)), default=0.0)
        for row in self.chains:
            own = [task for chain in row for task in chain]
            if own:
                busy = sum(self.lengths[task] for task in own)
                longest = max(longest, min(heads[n] for n in own) + busy + min(tails[n] for n in own))
        return longest

    def earliest(self, chosen: set[int]) -> list[float]:
        """The earliest starts of the chosen tasks if there were no others; 0 for the others."""
        starts = [0.0] * len(self.lengths)
        waiting = [sum(need in chosen for need, _ in needs) for needs in self.needs]
        ready = [task for task in chosen if not waiting[task]]
        while ready:
            task = ready.pop()
            end = starts[task] + self.lengths[task]
            for later, delay in self.needed_by[task]:
                if later in chosen:
                    starts[later] = max(starts[later], end + delay)
                    waiting[later] -= 1
                    if not waiting[later]:
                        ready.append(later)
        return starts


def list_schedule(
    tasks: Tasks, due: Sequence[float], expected: Sequence[float], overshoot: float
) -> list[float] | None:
    """Give every task a start time, going forward in time.

    A rank takes the next task of its main chain, unless the next one of another chain is due before it, or fits into
    the gap until the main chain can go on.

    Args:
        tasks: what is to be done.
        due: when each task should start at the latest; only compared with each other.
        expected: when tasks of the main chains would start if there were no others.
        overshoot: the share of a task by which it may be longer than the gap.

    Returns: start times, or ``None`` if needs and chains together have a cycle.
    """
    lengths, ranks, needs, needed_by = tasks.lengths, tasks.ranks, tasks.needs, tasks.needed_by
    waiting, ready = [len(row) for row in needs], [0.0] * len(lengths)
    starts: list[float] = [-1.0] * len(lengths)
    spots = [[0] * len(row) for row in tasks.chains]
    places = tasks.places
    free = [0.0] * len(tasks.chains)
    left, lag, now = len(lengths), 0.0, 0.0
    heap = [(0.0, rank) for rank in range(len(free))]
    while left:
        forced = -1
        if heap:
            now, rank = heapq.heappop(heap)
            if now < free[rank] - EPS:
                continue
        else:  # all ranks wait for something better to do: the most urgent of what they could do
            heads = [
                chain[spot]
                for row, row_spots in zip(tasks.chains, spots, strict=True)
                for chain, spot in zip(row, row_spots, strict=True)
                if spot < len(chain) and not waiting[chain[spot]]
            ]
            if not heads:
                return None
            forced = min(heads, key=lambda task: (due[task], task))
            rank = ranks[forced]
            now = max(now, free[rank], ready[forced])
        chains, own = tasks.chains[rank], spots[rank]
        main = chains[0][own[0]] if own[0] < len(chains[0]) else -1
        wake, goes_on, main_due = inf, inf, inf
        if main >= 0:
            main_due = due[main]
            goes_on = ready[main]
            if waiting[main]:
                goes_on = max(goes_on, expected[main] + lag)
                for need, delay in needs[main]:
                    if starts[need] < 0:
                        soonest = max(now, expected[need] + lag) + lengths[need] + delay
                        if soonest > goes_on:
                            goes_on = soonest
                if goes_on <= now + EPS:
                    goes_on = now + 2 * EPS
            elif goes_on > now + EPS:
                wake = goes_on
        chosen = forced
        for number in range(1, len(chains)):
            if own[number] == len(chains[number]):
                continue
            task = chains[number][own[number]]
            if waiting[task]:
                continue
            if ready[task] > now + EPS:
                wake = min(wake, ready[task])
            elif (
                forced < 0
                and (due[task] < main_due or now + lengths[task] <= goes_on + overshoot * lengths[task] + EPS)
                and (goes_on > now + EPS or due[task] < main_due)
                and (chosen < 0 or due[task] < due[chosen])
            ):
                chosen = task
        if chosen < 0 and main >= 0 and not waiting[main] and ready[main] <= now + EPS:
            chosen = main
        if chosen < 0:
            if wake < inf:
                heapq.heappush(heap, (wake, rank))
            continue
        if chosen == main:
            lag = max(lag, now - expected[main])
        own[places[chosen]] += 1
        starts[chosen] = now
        end = free[rank] = now + lengths[chosen]
        left -= 1
        for later, delay in needed_by[chosen]:
            if end + delay > ready[later]:
                ready[later] = end + delay
            waiting[later] -= 1
            if not waiting[later] and ranks[later] != rank:
                heapq.heappush(heap, (max(ready[later], free[ranks[later]]), ranks[later]))
        heapq.heappush(heap, (end, rank))
    return starts


def justify(tasks: Tasks, starts: Sequence[float]) -> list[float]:
    """Move every task, in order of start, to the earliest gap on its rank that it fits into; never longer."""
    lengths, ranks, needs = tasks.lengths, tasks.ranks, tasks.needs
    new: list[float] = [-1.0] * len(lengths)
    gaps = [([0.0], [inf]) for _ in tasks.chains]
    stack: list[int] = []
    spans = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    for task in sorted(range(len(lengths)), key=spans.__getitem__):
        stack.append(task)
        while stack:  # equal times may stand in the wrong order: what is needed goes first
            task = stack[-1]
            time, depth = 0.0, len(stack)
            for need, delay in needs[task]:
                if new[need] < 0:
                    stack.append(need)
                else:
                    available = new[need] + lengths[need] + delay
                    if available > time:
                        time = available
            if len(stack) > depth:
                continue
            stack.pop()
            if new[task] < 0:
                new[task] = _take(*gaps[ranks[task]], time, lengths[task]) if lengths[task] > 0 else time
    return new


def _take(gap_starts: list[float], gap_ends: list[float], time: float, length: float) -> float:
    """Take the first gap of this length from this time on."""
    gap = bisect_right(gap_ends, time + EPS)
    while True:
        first, last = gap_starts[gap], gap_ends[gap]
        start = first if first > time else time
        end = start + length
        if end <= last + EPS:
            break
        gap += 1
    before, after = start - first > EPS, last - end > EPS
    if before:
        gap_ends[gap] = start
        if after:
            gap_starts.insert(gap + 1, end)
            gap_ends.insert(gap + 1, last)
    elif after:
        gap_starts[gap] = end
    else:
        del gap_starts[gap], gap_ends[gap]
    return start


def _links(chains: list[list[list[int]]]) -> list[tuple[int, int]]:
    return [link for row in chains for chain in row for link in zip(chain, chain[1:], strict=False)]  # noqa: RUF007


def _essential(arcs: Iterable[tuple[int, int]], chains: list[list[list[int]]]) -> list[tuple[int, int]]:
    """Of a task's needs in a chain only the last, and of those that need it in a chain only the first."""
    spot = {
        task: (number, position)
        for number, chain in enumerate(chain for row in chains for chain in row)
        for position, task in enumerate(chain)
    }
    last: dict[tuple[int, int], int] = {}
    for one, other in arcs:
        key = (spot[one][0], other)
        if key not in last or spot[last[key]][1] < spot[one][1]:
            last[key] = one
    first: dict[tuple[int, int], int] = {}
    for (_, other), one in last.items():
        key = (one, spot[other][0])
        if key not in first or spot[first[key]][1] > spot[other][1]:
            first[key] = other
    return [(one, other) for (one, _), other in first.items()]
