"""Local search on a schedule: neighbours on a rank that lie on the critical path change places.

The neighbourhood of job-shop scheduling (van Laarhoven et al. 1992): only such a swap can shorten the schedule, and
none makes a cycle. The longest path through a swapped pair tells how much it gains (Taillard 1994). What was swapped
stays for a while, so that the search leaves local minima.

Knows tasks, their chains and needs; knows nothing of what the tasks are.
"""

from collections.abc import Sequence
from random import Random

from bigmac_lightning.schedule.placing.list_scheduling import EPS, Tasks


def swap(tasks: Tasks, starts: Sequence[float], passes: int, floor: float = 0.0) -> list[float]:
    """The shortest schedule found by swapping neighbours; the same on every run.

    Args:
        tasks: what is to be done.
        starts: a schedule to start from; given back if it does not keep the tasks' needs.
        passes: how many swaps to try; each costs about one pass over all tasks.
        floor: a makespan that is good enough to stop at.
    """
    if not tasks.kept_by(starts):
        return list(starts)
    search = _Swaps(tasks, starts)
    best, shortest = search.heads, search.makespan
    until: dict[tuple[int, int], int] = {}
    chance = Random(0)
    for step in range(passes):
        if shortest <= floor + EPS:
            break
        pairs = search.critical_pairs()
        if not pairs:
            break
        allowed = [
            (estimate, chance.random(), pair)
            for pair in pairs
            for estimate in (search.estimate(*pair),)
            if until.get(pair, 0) <= step or estimate < shortest - EPS
        ]
        pair = min(allowed)[2] if allowed else chance.choice(pairs)
        until[pair[1], pair[0]] = step + 6 + chance.randrange(8)
        search.swap(*pair)
        if search.makespan < shortest - EPS:
            best, shortest = search.heads, search.makespan
    return best


class _Swaps:
    """A schedule as every rank's sequence, with the longest paths to each task and from it.

    Attributes:
        heads: when each task starts.
        tails: how long it takes from each task's end to the end of everything.
        makespan: when the last task ends.
    """

    def __init__(self, tasks: Tasks, starts: Sequence[float]) -> None:
        self.tasks = tasks
        count = len(tasks.lengths)
        self.before, self.after = [-1] * count, [-1] * count
        order = sorted(range(count), key=lambda task: (starts[task], starts[task] + tasks.lengths[task]))
        last = [-1] * len(tasks.chains)
        for task in order:
            rank = tasks.ranks[task]
            self.before[task] = last[rank]
            if last[rank] >= 0:
                self.after[last[rank]] = task
            last[rank] = task
        self._update()

    def critical_pairs(self) -> list[tuple[int, int]]:
        """Critical neighbours on a rank, without a pause between them, whose order no need or chain fixes."""
        lengths, heads, tails, places = self.tasks.lengths, self.heads, self.tails, self.tasks.places
        critical = [heads[task] + length + tails[task] >= self.makespan - EPS for task, length in enumerate(lengths)]
        pairs: list[tuple[int, int]] = []
        for task, later in enumerate(self.after):
            if later < 0 or not (critical[task] and critical[later]) or places[task] == places[later]:
                continue
            if heads[task] + lengths[task] < heads[later] - EPS or self._fixed(task, later):
                continue
            pairs.append((task, later))
        return pairs

    def estimate(self, one: int, other: int) -> float:
        """The longest path through either of two neighbours, if they changed places."""
        lengths, heads, tails = self.tasks.lengths, self.heads, self.tails
        before, after = self.before[one], self.after[other]
        soonest = heads[before] + lengths[before] if before >= 0 else 0.0
        for need, delay in self.tasks.needs[other]:
            soonest = max(soonest, heads[need] + lengths[need] + delay)
        next_head = soonest + lengths[other]
        for need, delay in self.tasks.needs[one]:
            next_head = max(next_head, heads[need] + lengths[need] + delay)
        left = lengths[after] + tails[after] if after >= 0 else 0.0
        for later, delay in self.tasks.needed_by[one]:
            left = max(left, delay + lengths[later] + tails[later])
        longest = next_head + lengths[one] + left
        left += lengths[one]
        for later, delay in self.tasks.needed_by[other]:
            left = max(left, delay + lengths[later] + tails[later])
        return max(longest, soonest + lengths[other] + left)

    def swap(self, one: int, other: int) -> None:
        """Neighbours change places."""
        before, after = self.before[one], self.after[other]
        self.before[other], self.after[other] = before, one
        self.before[one], self.after[one] = other, after
        if before >= 0:
            self.after[before] = other
        if after >= 0:
            self.before[after] = one
        self._update()

    def _fixed(self, one: int, other: int) -> bool:
        return any(need == one for need, _ in self.tasks.needs[other])

    def _update(self) -> None:
        """Longest paths in both directions."""
        lengths, needs, needed_by = self.tasks.lengths, self.tasks.needs, self.tasks.needed_by
        before, after = self.before, self.after
        waiting = [len(row) + (before[task] >= 0) for task, row in enumerate(needs)]
        heads = [0.0] * len(lengths)
        order = [task for task, left in enumerate(waiting) if not left]
        for task in order:
            end = heads[task] + lengths[task]
            for later, delay in needed_by[task]:
                if end + delay > heads[later]:
                    heads[later] = end + delay
                waiting[later] -= 1
                if not waiting[later]:
                    order.append(later)
            later = after[task]
            if later >= 0:
                if end > heads[later]:
                    heads[later] = end
                waiting[later] -= 1
                if not waiting[later]:
                    order.append(later)
        assert len(order) == len(lengths), "a swap of critical neighbours made a cycle"
        tails = [0.0] * len(lengths)
        for task in reversed(order):
            left = lengths[after[task]] + tails[after[task]] if after[task] >= 0 else 0.0
            for later, delay in needed_by[task]:
                path = delay + lengths[later] + tails[later]
                if path > left:
                    left = path
            tails[task] = left
        self.heads, self.tails = heads, tails
        self.makespan = max((head + length for head, length in zip(heads, lengths, strict=True)), default=0.0)
