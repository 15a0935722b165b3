"""Tabu search on a schedule: two tasks that are neighbours on a rank and on the critical path are swapped, again and
again.

This is the usual neighbourhood of job-shop scheduling (van Laarhoven, Aarts & Lenstra 1992): only a swap of critical
neighbours can shorten the schedule, and no such swap makes a cycle. The longest path through the two swapped tasks
estimates the new makespan without a pass over all tasks (Taillard 1994). A swap may not be undone for some steps (it is
tabu), so that the search leaves local minima.
"""

from collections.abc import Sequence
from random import Random

from bigmac_lightning.schedule.placing.tasks import EPS, Tasks

MIN_TENURE, TENURE_RANGE = 6, 8
"""A swapped pair may not be swapped back for MIN_TENURE to MIN_TENURE + TENURE_RANGE - 1 steps.

Lengths of about 10 that vary at random are usual for job shops (Taillard 1994). On the settings of
tests/schedule/test_filling.py these gave plans 0.11% above the optimum; 2 to 5, 12 to 27 and 30 to 39 steps gave 0.28%.
"""


def swap(tasks: Tasks, starts: Sequence[float], passes: int, lower_bound: float = 0.0) -> list[float]:
    """Return the start times of the shortest schedule found. The result is the same on every run, and never longer.

    Args:
        tasks: the tasks to schedule.
        starts: start times of the initial schedule; they are returned unchanged if they violate the tasks' needs.
        passes: number of swaps; each takes about as long as one pass over all tasks.
        lower_bound: a makespan at which the search stops, because no schedule is shorter.
    """
    if not tasks.is_feasible(starts):
        return list(starts)
    search = _Swaps(tasks, starts)
    best, shortest = search.heads, search.makespan
    tabu_until: dict[tuple[int, int], int] = {}
    rng = Random(0)  # all ranks of a pipeline must find the same plan
    for step in range(passes):
        if shortest <= lower_bound + EPS:
            break
        pairs = search.critical_pairs()
        if not pairs:
            break
        # A tabu pair is allowed if it leads to a new best schedule; pairs with equal estimates are ordered at random.
        allowed = [
            (estimate, rng.random(), pair)
            for pair in pairs
            for estimate in (search.estimate(*pair),)
            if tabu_until.get(pair, 0) <= step or estimate < shortest - EPS
        ]
        pair = min(allowed)[2] if allowed else rng.choice(pairs)
        tabu_until[pair[1], pair[0]] = step + MIN_TENURE + rng.randrange(TENURE_RANGE)
        search.swap(*pair)
        if search.makespan < shortest - EPS:
            best, shortest = search.heads, search.makespan
    return best


class _Swaps:
    """A schedule as the sequence of tasks on each rank, with the longest paths to and from each task.

    Attributes:
        before, after: per task, the task before and the task after it on its rank; -1 if there is none.
        heads: per task, the length of the longest path to it, which is its start time.
        tails: per task, the length of the longest path from its end to the end of the schedule.
        makespan: end time of the last task.
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
        """Return all pairs of critical neighbours on a rank, without idle time between them, whose order is not fixed
        by a need or a chain."""
        lengths, heads, tails, chain_of = self.tasks.lengths, self.heads, self.tails, self.tasks.chain_of
        critical = [heads[task] + length + tails[task] >= self.makespan - EPS for task, length in enumerate(lengths)]
        pairs: list[tuple[int, int]] = []
        for task, later in enumerate(self.after):
            if later < 0 or not (critical[task] and critical[later]) or chain_of[task] == chain_of[later]:
                continue
            if heads[task] + lengths[task] < heads[later] - EPS or self._fixed(task, later):
                continue
            pairs.append((task, later))
        return pairs

    def estimate(self, one: int, other: int) -> float:
        """Return the length of the longest path through `one` or `other`, which are neighbours, after they are swapped.

        It is a lower bound on the new makespan, because paths that avoid both tasks may be longer (Taillard 1994).
        """
        lengths, heads, tails = self.tasks.lengths, self.heads, self.tails
        before, after = self.before[one], self.after[other]
        head_of_other = heads[before] + lengths[before] if before >= 0 else 0.0
        for need, delay in self.tasks.needs[other]:
            head_of_other = max(head_of_other, heads[need] + lengths[need] + delay)
        head_of_one = head_of_other + lengths[other]
        for need, delay in self.tasks.needs[one]:
            head_of_one = max(head_of_one, heads[need] + lengths[need] + delay)
        tail = lengths[after] + tails[after] if after >= 0 else 0.0
        for later, delay in self.tasks.needed_by[one]:
            tail = max(tail, delay + lengths[later] + tails[later])
        longest = head_of_one + lengths[one] + tail
        tail += lengths[one]
        for later, delay in self.tasks.needed_by[other]:
            tail = max(tail, delay + lengths[later] + tails[later])
        return max(longest, head_of_other + lengths[other] + tail)

    def swap(self, one: int, other: int) -> None:
        """Swap two neighbours, of which `one` is the first, and update all paths."""
        before, after = self.before[one], self.after[other]
        self.before[other], self.after[other] = before, one
        self.before[one], self.after[one] = other, after
        if before >= 0:
            self.after[before] = other
        if after >= 0:
            self.before[after] = one
        self._update()

    def _fixed(self, one: int, other: int) -> bool:
        """Whether `other` needs `one`."""
        return any(need == one for need, _ in self.tasks.needs[other])

    def _update(self) -> None:
        """Compute heads, in topological order, and tails, in the opposite order."""
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
            tail = lengths[after[task]] + tails[after[task]] if after[task] >= 0 else 0.0
            for later, delay in needed_by[task]:
                path = delay + lengths[later] + tails[later]
                if path > tail:
                    tail = path
            tails[task] = tail
        self.heads, self.tails = heads, tails
        self.makespan = max((head + length for head, length in zip(heads, lengths, strict=True)), default=0.0)
