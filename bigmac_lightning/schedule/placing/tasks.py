"""Tasks for the filling pass: their times, ranks and dependencies, without regard to what they compute.

The tasks of a rank form a few chains. The order within a chain is fixed, but a rank may execute its chains interleaved
in any way. ``list_scheduling``, ``justification`` and ``swaps`` compute schedules of tasks, that is, their start times.
"""

from collections.abc import Iterable, Sequence

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
