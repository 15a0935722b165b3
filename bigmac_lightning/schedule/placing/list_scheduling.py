"""List scheduling with look-ahead: makes a schedule of tasks in one pass forward in time.

It works in either direction of time, as the tasks can be mirrored (see ``Tasks.mirrored``).
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from math import inf

from bigmac_lightning.schedule.placing.tasks import EPS, Tasks

UNKNOWN = -1.0
"""An end of a gap that has not been predicted; times are not negative."""


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
