"""Schedules tasks on ranks. The tasks of a rank form a few chains; the order within a chain is fixed, but a rank may
execute its chains interleaved in any way.

There are two algorithms, and both work in either direction of time (see ``Tasks.mirrored``). List scheduling with
look-ahead makes a new schedule. Justification improves one, by inserting each task into the earliest gap that it fits
into (the serial schedule generation scheme, Kolisch & Hartmann 1999; a justified schedule is never longer, Valls et al.
2005).
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from math import inf

UNKNOWN = -1.0
"""An end of a gap that has not been predicted; times are not negative."""

Edge = tuple[int, float]
"""Another task, and the delay between the end of the first and the start of the second of the two."""

EPS = 1e-9
"""Times that differ by less are equal: far above rounding errors of times near 1, and far below any action's time."""


class Tasks:
    """Tasks, numbered from 0, with their times and dependencies.

    Args:
        lengths: time that each task takes, in any unit.
        ranks: rank of each task.
        chains: per rank, its chains; each is a list of tasks in their fixed order. The first one is the main chain.
        arcs: pairs of tasks, where the second needs the first.
        latency: delay between a task and another one on a different rank that needs it.

    Attributes:
        lengths, ranks, chains: as given.
        chain_of: per task, the number of its chain on its rank.
        needs: per task, the tasks that must end before it starts, with delays. They include its predecessor in its
            chain.
        needed_by: per task, the tasks that need it, with delays.
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
        self.chain_of = [0] * len(self.lengths)
        for row in self.chains:
            for number, chain in enumerate(row):
                for task in chain:
                    self.chain_of[task] = number
        self.needs: list[list[Edge]] = [[] for _ in lengths]
        self.needed_by: list[list[Edge]] = [[] for _ in lengths]
        for one, other in [*_essential(arcs, self.chains), *_links(self.chains)]:
            delay = latency if ranks[one] != ranks[other] else 0.0
            self.needs[other].append((one, delay))
            self.needed_by[one].append((other, delay))

    def mirrored(self) -> "Tasks":
        """Return the same tasks with time running backwards: chains are reversed, needs and needed_by exchanged."""
        other = object.__new__(Tasks)
        other.lengths, other.ranks, other.chain_of = self.lengths, self.ranks, self.chain_of
        other.chains = [[chain[::-1] for chain in row] for row in self.chains]
        other.needs, other.needed_by = self.needed_by, self.needs
        return other

    def mirror(self, starts: Sequence[float]) -> list[float]:
        """Convert start times of these tasks into start times of the mirrored tasks."""
        end = self.makespan(starts)
        return [end - start - length for start, length in zip(starts, self.lengths, strict=True)]

    def makespan(self, starts: Sequence[float]) -> float:
        """Return the end time of the last task."""
        return max((start + length for start, length in zip(starts, self.lengths, strict=True)), default=0.0)

    def is_feasible(self, starts: Sequence[float]) -> bool:
        """Whether a schedule respects all needs and chains."""
        ends = [start + length for start, length in zip(starts, self.lengths, strict=True)]
        return all(
            ends[need] + delay <= start + EPS
            for start, needs in zip(starts, self.needs, strict=True)
            for need, delay in needs
        )

    def lower_bound(self) -> float:
        """Return a time below which no schedule can end: the longest chain of needs, or the time of a rank's tasks plus
        the shortest time that must pass before the first of them starts and after the last of them ends."""
        all_tasks = set(range(len(self.lengths)))
        heads, tails = self.earliest(all_tasks), self.mirrored().earliest(all_tasks)
        longest = max((h + t + n for h, t, n in zip(heads, tails, self.lengths, strict=True)), default=0.0)
        for row in self.chains:
            own = [task for chain in row for task in chain]
            if own:
                busy = sum(self.lengths[task] for task in own)
                longest = max(longest, min(heads[n] for n in own) + busy + min(tails[n] for n in own))
        return longest

    def earliest(self, subset: set[int]) -> list[float]:
        """Return the earliest start of each task in `subset` if the other tasks did not exist; 0 for the other
        tasks."""
        starts = [0.0] * len(self.lengths)
        waiting = [sum(need in subset for need, _ in needs) for needs in self.needs]
        ready = [task for task in subset if not waiting[task]]
        while ready:
            task = ready.pop()
            end = starts[task] + self.lengths[task]
            for later, delay in self.needed_by[task]:
                if later in subset:
                    starts[later] = max(starts[later], end + delay)
                    waiting[later] -= 1
                    if not waiting[later]:
                        ready.append(later)
        return starts


def list_schedule(
    tasks: Tasks, due: Sequence[float], expected: Sequence[float], overshoot: float
) -> list[float] | None:
    """Return the start times of a schedule that is made in one pass forward in time.

    When a rank is free, it starts the next task of its main chain, unless the next task of another chain is due
    earlier, or fits into the gap until the main chain can go on.

    Args:
        tasks: the tasks to schedule.
        due: per task, the latest time at which it should start. Due times are only compared with each other.
        expected: per task of a main chain, the time at which it would start if the other chains did not exist.
        overshoot: fraction of a task's length by which the task may be longer than the gap.

    Returns: the start times, or ``None`` if needs and chains together have a cycle.
    """
    return _ListScheduler(tasks, due, expected, overshoot).run()


class _ListScheduler:
    """The state of one pass of list scheduling. The arguments are those of ``list_schedule``.

    Attributes:
        starts: per task, its start time; -1 while it is not scheduled.
        waiting: per task, the number of its needs that are not scheduled.
        ready: per task, the time at which the results of its scheduled needs are there.
        positions: per rank and chain, the position of the chain's next task.
        free: per rank, the end of its last task.
        lag: the largest delay so far of a main chain's task against its expected start.
        events: heap of (time, rank) at which the rank may be able to start a task.
    """

    __slots__ = (
        "due",
        "events",
        "expected",
        "free",
        "lag",
        "overshoot",
        "positions",
        "ready",
        "starts",
        "tasks",
        "waiting",
    )

    def __init__(self, tasks: Tasks, due: Sequence[float], expected: Sequence[float], overshoot: float) -> None:
        self.tasks, self.due, self.expected, self.overshoot = tasks, due, expected, overshoot
        self.starts = [-1.0] * len(tasks.lengths)
        self.waiting, self.ready = [len(row) for row in tasks.needs], [0.0] * len(tasks.lengths)
        self.positions = [[0] * len(row) for row in tasks.chains]
        self.free = [0.0] * len(tasks.chains)
        self.lag = 0.0
        self.events = [(0.0, rank) for rank in range(len(tasks.chains))]

    def run(self) -> list[float] | None:
        """Schedule all tasks."""
        now, events, free = 0.0, self.events, self.free
        for _ in self.starts:
            task = -1
            while task < 0:
                if not events:  # every rank left a gap open for a better task; now the most urgent task must fill one
                    task = self._most_urgent()
                    if task < 0:
                        return None
                    now = max(now, free[self.tasks.ranks[task]], self.ready[task])
                    break
                now, rank = heappop(events)
                if now >= free[rank] - EPS:  # else another event has already started a task on this rank
                    task = self._next_task(rank, now)
            self._start(task, now)
        return self.starts

    def _most_urgent(self) -> int:
        """Return the task that is due first among all that could start; -1 if none could."""
        candidates = [
            chain[position]
            for chains, positions in zip(self.tasks.chains, self.positions, strict=True)
            for chain, position in zip(chains, positions, strict=True)
            if position < len(chain) and not self.waiting[chain[position]]
        ]
        return min(candidates, key=lambda task: (self.due[task], task), default=-1)

    def _next_task(self, rank: int, now: float) -> int:
        """Return the task that a free rank starts now; -1 if it starts none, with an event for the next attempt."""
        due, ready, waiting, lengths = self.due, self.ready, self.waiting, self.tasks.lengths
        chains, positions = self.tasks.chains[rank], self.positions[rank]
        main = chains[0][positions[0]] if positions[0] < len(chains[0]) else -1
        wake, gap_end, main_due = inf, inf, inf
        if main >= 0:
            main_due = due[main]
            gap_end = UNKNOWN if waiting[main] else ready[main]
            if gap_end > now + EPS:
                wake = gap_end
        best = -1
        for number in range(1, len(chains)):
            if positions[number] == len(chains[number]):
                continue
            task = chains[number][positions[number]]
            if waiting[task]:
                continue
            if ready[task] > now + EPS:
                wake = min(wake, ready[task])
            elif best < 0 or due[task] < due[best]:
                if due[task] >= main_due and gap_end == UNKNOWN:  # predicted only here, as this takes time
                    gap_end = self._expected_start(main, now)
                fits = now + EPS < gap_end and now + lengths[task] <= gap_end + self.overshoot * lengths[task] + EPS
                if due[task] < main_due or fits:
                    best = task
        if best >= 0:
            return best
        if main >= 0 and not waiting[main] and ready[main] <= now + EPS:
            return main
        if wake < inf:
            heappush(self.events, (wake, rank))
        return -1

    def _expected_start(self, main: int, now: float) -> float:
        """Predict when a main task can start that has needs which are not scheduled: these start when expected, plus
        the lag so far, but not before now."""
        lengths, expected, starts, lag = self.tasks.lengths, self.expected, self.starts, self.lag
        start = max(self.ready[main], expected[main] + lag)
        for need, delay in self.tasks.needs[main]:
            if starts[need] < 0:
                soonest = max(now, expected[need] + lag) + lengths[need] + delay
                if soonest > start:
                    start = soonest
        return start if start > now + EPS else now + 2 * EPS  # there is a gap, however short, as the task cannot start

    def _start(self, task: int, now: float) -> None:
        """Schedule a task now, and create events for the ranks whose tasks it makes ready."""
        tasks, ready, waiting, events = self.tasks, self.ready, self.waiting, self.events
        rank, chain = tasks.ranks[task], tasks.chain_of[task]
        if chain == 0 and now - self.expected[task] > self.lag:
            self.lag = now - self.expected[task]
        self.positions[rank][chain] += 1
        self.starts[task] = now
        end = self.free[rank] = now + tasks.lengths[task]
        for later, delay in tasks.needed_by[task]:
            if end + delay > ready[later]:
                ready[later] = end + delay
            waiting[later] -= 1
            if not waiting[later] and tasks.ranks[later] != rank:
                other = tasks.ranks[later]
                heappush(events, (max(ready[later], self.free[other]), other))
        heappush(events, (end, rank))


def justify(tasks: Tasks, starts: Sequence[float]) -> list[float]:
    """Return a schedule in which every task, in order of start, is moved into the earliest gap on its rank that it fits
    into after its needs. It is never longer than the given schedule (Valls et al. 2005).

    Tasks of time 0 need no gap; they start when their needs have ended.
    """
    lengths, ranks, needs = tasks.lengths, tasks.ranks, tasks.needs
    new: list[float] = [-1.0] * len(lengths)
    gaps = [([0.0], [inf]) for _ in tasks.chains]
    stack: list[int] = []
    spans = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    for task in sorted(range(len(lengths)), key=spans.__getitem__):
        stack.append(task)
        while stack:  # tasks with equal times may be sorted in the wrong order, so the needs of a task are placed first
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
                new[task] = _insert(*gaps[ranks[task]], time, lengths[task]) if lengths[task] > 0 else time
    return new


def _insert(gap_starts: list[float], gap_ends: list[float], time: float, length: float) -> float:
    """Insert a task of this length into the first gap that it fits into at this time or later; return its start.

    `gap_starts` and `gap_ends` are the sorted gaps of a rank, which are changed: what is left of the gap remains in
    them.
    """
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
    """Return the pairs of neighbours in all chains."""
    return [link for row in chains for chain in row for link in zip(chain, chain[1:], strict=False)]  # noqa: RUF007


def _essential(arcs: Iterable[tuple[int, int]], chains: list[list[list[int]]]) -> list[tuple[int, int]]:
    """Return the arcs that do not follow from other arcs and the chains. Fewer arcs make every pass faster.

    Of all tasks in one chain that a task needs, only the last one matters; of all tasks in one chain that need a task,
    only the first one matters.
    """
    position_of = {
        task: (number, position)
        for number, chain in enumerate(chain for row in chains for chain in row)
        for position, task in enumerate(chain)
    }
    last: dict[tuple[int, int], int] = {}
    for one, other in arcs:
        key = (position_of[one][0], other)
        if key not in last or position_of[last[key]][1] < position_of[one][1]:
            last[key] = one
    first: dict[tuple[int, int], int] = {}
    for (_, other), one in last.items():
        key = (one, position_of[other][0])
        if key not in first or position_of[first[key]][1] > position_of[other][1]:
            first[key] = other
    return [(one, other) for (one, _), other in first.items()]
