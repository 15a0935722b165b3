"""Justification: improves a schedule by inserting each task into the earliest gap that it fits into.

This is the serial schedule generation scheme (Kolisch & Hartmann 1999), with the tasks in the order of a given
schedule. A justified schedule is never longer than the given one (Valls et al. 2005). With mirrored tasks (see
``Tasks.mirrored``) it moves each task to the latest gap instead.
"""

from bisect import bisect_right
from collections.abc import Sequence
from math import inf

from bigmac_lightning.schedule.placing.tasks import EPS, Tasks


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
