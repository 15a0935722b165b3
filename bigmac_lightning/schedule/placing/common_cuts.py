"""Cuts for ranks that wait for each other inside nested actions, as the weights lie in shards on all of them.

A rank that is busy at a cut comes later than the others, which wait for it, and so the whole schedule gets longer by
the time that its running action has left. So there should be few times at which ranks meet, and at these little should
be left to do: the work of several groups and kinds is inserted at one time, within the limits of each.
"""

from bisect import bisect_left
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.placing.cut import Cut
from bigmac_lightning.schedule.simulate import Timeline

MOST_TIMES = 50
"""Times within a window that are compared: plans of 2 to 8 ranks have fewer."""


class Window(NamedTuple):
    """Where in the bare schedule a group's work of one kind may be inserted."""

    earliest: float
    latest: float
    kind: Kind
    group: int


def encoder_windows(due: Sequence[float], ready: Sequence[float]) -> list[Window]:
    """The windows of encoder work, such that no more groups are alive at once than if forwards were as late and
    backwards as early as possible.

    Args:
        due: per group, when its forward must run at the latest.
        ready: per group, when its backward can run at the earliest; empty if there are no backwards.
    """
    if not ready:
        return [
            Window(before, latest, "EF", g) for g, (before, latest) in enumerate(zip([-inf, *due], due, strict=False))
        ]
    alive = max(g - bisect_left(ready, latest) for g, latest in enumerate(due)) + 1
    before, after = [-inf] * alive + list(ready), [*due, *[inf] * alive]
    forwards = [Window(min(before[g], due[g]), due[g], "EF", g) for g in range(len(due))]
    return forwards + [Window(ready[g], max(after[g + alive], ready[g]), "EB", g) for g in range(len(due))]


def common_cuts(windows: Sequence[Window], bare: Timeline, tolerance: float) -> list[Cut]:
    """A cut in each window: at as few times as possible, each of which is the one with the least waiting."""
    left, cuts = sorted(windows, key=lambda window: window.latest), list[Cut]()
    while left:
        last = left[0].latest
        here = [window for window in left if window.earliest <= last]
        left = [window for window in left if window.earliest > last]
        time = _best_time(max(window.earliest for window in here), last, bare, tolerance)
        cuts += [Cut(time, window.kind, window.group) for window in here]
    return cuts


def _best_time(earliest: float, latest: float, bare: Timeline, tolerance: float) -> float:
    """The first time with the least waiting."""
    within = {end for row in bare.ends for end in row if earliest < end < latest}
    between = sorted(within)[:: len(within) // MOST_TIMES + 1]
    times = [earliest, *between, *([latest] if latest < inf else [])]
    return min(times, key=lambda time: _left(time, bare, tolerance))


def _left(time: float, bare: Timeline, tolerance: float) -> float:
    """How long the rank that is busy the longest with an action which runs at a time has to go on with it."""
    longest = 0.0
    for starts, ends in zip(bare.starts, bare.ends, strict=True):
        running = bisect_left(starts, time - tolerance) - 1
        if running >= 0:
            longest = max(longest, ends[running] - time)
    return longest
