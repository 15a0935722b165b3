"""The filling pass of policy `filled`: moves nested actions into the bubbles of the backbone.

It starts from the plan of policy `nested`, here called the cut, and its plans are never longer. It keeps the backbone's
order, except that weight gradients (W), for which no action waits, may move as far as the backbone's memory allows. It
also keeps the limit on live encoder units, and one sequence of nested actions for all ranks.

This module decides which schedules are tried. ``plan_tasks`` converts the plan to tasks; ``list_scheduling``,
``justification`` and ``swaps`` compute the schedules.
"""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.liveness import live_encoder_units
from bigmac_lightning.schedule.placing.cut import Cut
from bigmac_lightning.schedule.placing.justification import justify
from bigmac_lightning.schedule.placing.list_scheduling import list_schedule
from bigmac_lightning.schedule.placing.nested_orders import NestedOrders
from bigmac_lightning.schedule.placing.nesting import consistent_cuts, nest
from bigmac_lightning.schedule.placing.plan_tasks import PlanTasks, with_pieces
from bigmac_lightning.schedule.placing.policy_input import PolicyInput
from bigmac_lightning.schedule.placing.swaps import swap
from bigmac_lightning.schedule.placing.tasks import EPS, Tasks
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import Timeline, simulate
from bigmac_lightning.schedule.workload import Workload

# These constants were chosen by trial. "Gap" is the mean distance from the proven optima in the settings of
# tests/schedule/test_filling.py with whole shares, which is 0.11% with the values below.

OVERSHOOTS = (0.5, 0.0, 1.0)
"""Values of ``list_schedule``'s argument that are tried. With 0.5 alone the gap is 0.17%, with 0.0 alone 0.68%; two
more values in between gained nothing."""

PASSES = 120_000
"""The number of passes over all tasks is about PASSES divided by the plan's number of actions, so that planning time
hardly depends on the plan's size. A quarter of it leaves a gap of 0.37%; four times as many take 1.7 times as long and
lower the gap no further."""

FEWEST_PASSES, MOST_PASSES = 6, 600
"""Limits on the number of passes. At most 150 passes leave a gap of 0.37%; at most 2400 gain nothing. The lower limit
matters for plans with more than 20,000 actions only."""

FEWEST_PASSES_FOR_BACKWARD = 30
"""With this number of passes or less, there is no lower bound and no backward list scheduling, which saves time for
plans with more than 4,000 actions. Without either for all plans, those of 4 to 8 ranks were 0.07% longer."""

JUSTIFIED, SWAPPED = 10, 4
"""Numbers of the best schedules that are improved by justification, and by swaps. With JUSTIFIED = 3, plans of 4 to 8
ranks were 0.1% longer, and 30 gained nothing. With SWAPPED = 1 they were 0.03% longer; with 12 the gap is 0.28%,
because the passes are divided among the schedules."""

DUE_EARLIER = 3
"""When two nested actions are exchanged, the later one becomes due earlier by this many times the longest LLM action,
so that list scheduling really moves it. This value was chosen without trial."""


def fill(plan: Plan, policy_input: PolicyInput) -> list[list[Action]]:
    """Return every rank's actions: the bare backbone of `plan` with its nested work in bubbles.

    Args:
        plan: a plan whose lists have only the bare backbone's actions.
        policy_input: its limit on encoder units is by default 2, or 3 with a generator, or the peak of the cut if that
            is more. Pieces of encoder shares are not made shorter than about half of the shortest stage's forward: with
            such pieces, exact solutions already reach the lower bound. The generator's shares are not cut into pieces,
            because that gains nothing.

    Returns: the best lists found. They are those of the cut if nothing better is found, even if the cut exceeds the
        limit on encoder units; ``verify`` then refuses the plan.
    """
    workload, limit = policy_input.workload, policy_input.max_encoder_units
    cut = replace(plan, ranks=nest(plan, policy_input.bare, workload=workload))
    if limit is None:
        peak = max((units for row in live_encoder_units(cut, workload) for units in row), default=0.0)
        limit = max(default_limit(plan), peak)
    plans = with_pieces(cut, workload, policy_input.pieces)
    found = [_Search(start, plan, policy_input.bare, workload, limit).run() for start in plans]
    return min((lists for lists in found if lists is not None), default=(0.0, cut.ranks), key=lambda lists: lists[0])[1]


def default_limit(plan: Plan) -> float:
    """Return the default limit on live encoder units, for plans whose cut needs no more.

    On 1F1B with groups of P microbatches, the cut needs at most 2 units, or 3 with a generator, whose extra
    microbatches in flight keep the encoder's activations alive for longer.
    """
    return 3.0 if "G" in plan.costs.kinds else 2.0


class _Schedule(NamedTuple):
    """A schedule. Schedules sort by makespan, and then by number.

    Attributes:
        makespan: its makespan.
        number: the number of schedules that were found before it.
        starts: start time of each task.
        tasks: the tasks.
    """

    makespan: float
    number: int
    starts: list[float]
    tasks: Tasks


class _Search:
    """The search for a short schedule of the actions of a cut plan, which are numbered as in ``Dataflow``.

    Args:
        cut: the plan with all its actions, from which the search starts.
        plan: the same plan with only the bare backbone's actions.
        bare: the simulated timeline of the bare backbone.
        workload: the work of each microbatch, where microbatches differ.
        max_encoder_units: limit on the encoder units alive on a rank.

    Attributes:
        cuts: the cuts of groups that have work, in order of time.
        conversion: converts sequences of nested actions to tasks, and schedules to lists.
        budget: remaining number of passes over all tasks.
        best: the shortest schedule found so far.
        lower_bound: a makespan below which there is no schedule.
        sequences: the sequence of nested actions of each set of tasks.
    """

    def __init__(
        self, cut: Plan, plan: Plan, bare: Timeline, workload: Workload | None, max_encoder_units: float
    ) -> None:
        cuts = consistent_cuts(plan, bare, workload=workload)
        self.cuts = [cut for cut in cuts if any(plan.shares(cut.kind)[cut.group])]
        self.conversion = PlanTasks(cut, plan, bare, workload, self.cuts)
        self.orders = NestedOrders(plan, self.cuts, max_encoder_units, workload)
        self.cut_starts = [start for row in simulate(cut, workload, flow=self.conversion.flow).starts for start in row]
        self.budget = min(MOST_PASSES, max(FEWEST_PASSES, PASSES // max(1, len(self.conversion.lengths))))
        self.best: _Schedule | None = None
        self.lower_bound = 0.0
        self.sequences: dict[Tasks, list[Cut]] = {}

    def run(self) -> tuple[float, list[list[Action]]] | None:
        """Return the makespan and the lists of the best schedule; ``None`` if no schedule keeps the limit.

        List scheduling and justification together use about half of the passes, backward list scheduling at most a
        quarter for each of two schedules, other sequences of nested actions at most a quarter, and swaps use the rest.
        """
        total = self.budget
        schedules = self._first_schedules()
        for number, schedule in enumerate(schedules[:JUSTIFIED]):
            if number and self.budget < total // 2:
                break
            starts = self._justify(schedule.tasks, schedule.starts)
            schedules[number] = _Schedule(schedule.tasks.makespan(starts), schedule.number, starts, schedule.tasks)
        schedules.sort()
        for schedule in schedules[: 2 * (total > FEWEST_PASSES_FOR_BACKWARD)]:
            self._schedule_backward(schedule.tasks, schedule.starts, total // 4)
        if self.best is None:
            return None
        self._exchange_in_sequence(total // 4)
        schedules = [self.best, *schedules[: SWAPPED - 1]]
        for left, schedule in zip(range(len(schedules), 0, -1), schedules, strict=True):
            passes = self.budget // (2 * left)  # a swap updates paths in both directions, which takes two passes
            if passes < 1 or self._is_optimal():
                break
            starts = swap(schedule.tasks, schedule.starts, passes, self.lower_bound)
            self.budget -= 2 * passes
            self._record(schedule.tasks, starts)
        return self.best.makespan, self.conversion.lists(self.best.starts)

    def _first_schedules(self) -> list[_Schedule]:
        """Return the cut, and the results of list scheduling for each sequence of nested actions; the shortest
        first."""
        schedules: list[_Schedule] = []
        most = max(1, self.budget // 3)
        for sequence in self.orders.sequences():
            tasks = self._tasks(sequence)
            if not schedules and self.budget > FEWEST_PASSES_FOR_BACKWARD:
                self.lower_bound = tasks.lower_bound()
            if sequence == self.cuts:
                makespan = self._record(tasks, self.cut_starts)
                schedules.append(_Schedule(makespan, len(schedules), self.cut_starts, tasks))
            for due in self.conversion.dues(tasks):
                for overshoot in OVERSHOOTS:
                    if len(schedules) >= most or self._is_optimal():
                        return sorted(schedules)
                    starts = list_schedule(tasks, due, self.conversion.expected, overshoot)
                    if starts is None:
                        break
                    if all(starts != schedule.starts for schedule in schedules):
                        schedules.append(_Schedule(self._record(tasks, starts), len(schedules), starts, tasks))
        return sorted(schedules)

    def _is_optimal(self) -> bool:
        """Whether the best schedule is known to be optimal, because it reaches the lower bound."""
        return self.best is not None and self.best.makespan <= self.lower_bound + EPS

    def _record(self, tasks: Tasks, starts: list[float]) -> float:
        """Count one pass, keep the schedule if it is the best so far, and return its makespan."""
        makespan = tasks.makespan(starts)
        self.budget -= 1
        if self.best is None or makespan < self.best.makespan - EPS:
            self.best = _Schedule(makespan, 0, starts, tasks)
        return makespan

    def _justify(self, tasks: Tasks, starts: list[float]) -> list[float]:
        """Justify a schedule to the right and then to the left, again and again until it gets no shorter."""
        mirrored = tasks.mirrored()
        while self.budget > 0 and not self._is_optimal():
            before = tasks.makespan(starts)
            right = mirrored.mirror(justify(mirrored, tasks.mirror(starts)))
            starts = justify(tasks, right)
            self.budget -= 1
            if self._record(tasks, starts) > before - EPS:
                break
        return starts

    def _schedule_backward(self, tasks: Tasks, starts: list[float], passes: int) -> None:
        """Run list scheduling backward in time, from the end, and then forward again, until the schedule gets no
        shorter or this many passes are made.

        The start times of one schedule are the due times of the next one.
        """
        least = self.budget - passes
        mirrored = tasks.mirrored()
        expected = mirrored.earliest(self.conversion.main)
        gained = True
        while gained and self.budget > least and not self._is_optimal():
            gained, before = False, tasks.makespan(starts)
            for overshoot in OVERSHOOTS:
                back = list_schedule(mirrored, tasks.mirror(starts), expected, overshoot)
                if back is None or self.budget <= least:
                    break
                left = justify(tasks, mirrored.mirror(back))
                self._record(tasks, left)
                for again in OVERSHOOTS:
                    forward = list_schedule(tasks, left, self.conversion.expected, again)
                    if forward is not None and self.budget > least:
                        left_again = self._justify(tasks, forward)
                        if tasks.makespan(left_again) < before - EPS:
                            starts, before, gained = left_again, tasks.makespan(left_again), True

    def _exchange_in_sequence(self, passes: int) -> None:
        """Exchange neighbours in the sequence of nested actions, until no exchange makes the best schedule shorter or
        this many passes are made.

        Swaps cannot do this, as they act on one rank, and the sequence must be the same on all ranks.
        """
        assert self.best is not None
        least = self.budget - passes
        earlier = DUE_EARLIER * self.conversion.longest
        gained = True
        while gained:
            gained, (before, _, starts, tasks) = False, self.best
            for spot, (one, other) in enumerate(pairwise(self.sequences[tasks])):
                sequence = list(self.sequences[tasks])
                sequence[spot : spot + 2] = [other, one]
                if one.kind == other.kind or not self.orders.keeps_limit(sequence):
                    continue
                if self.budget <= least or self._is_optimal():
                    return
                due = [
                    start - earlier * ((action.kind, action.index) == (other.kind, other.group))
                    for start, action in zip(starts, self.conversion.flow.actions, strict=True)
                ]
                reordered = self._tasks(sequence)
                found = list_schedule(reordered, due, self.conversion.expected, OVERSHOOTS[0])
                self.budget -= 2
                if found is not None:
                    self._justify(reordered, found)
                if self.best.makespan < before - EPS:
                    gained = True
                    break

    def _tasks(self, sequence: list[Cut]) -> Tasks:
        """Return the tasks for a sequence of nested actions, and remember the sequence."""
        tasks = self.conversion.tasks(sequence)
        self.sequences[tasks] = sequence
        return tasks
