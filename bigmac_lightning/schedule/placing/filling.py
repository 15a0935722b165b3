"""The filling pass: moves the nested actions of a cut plan into the bubbles of its backbone.

Keeps the backbone's order, except that weight gradients (W), which nobody waits for, may move within the backbone's
memory. Keeps the limit on live encoder units, and one sequence of nested actions for all ranks. Never longer than the
cut, which it starts from.

Knows plans, their dependencies and memory; knows nothing of how tasks are scheduled (see ``tasks``).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil, inf
from typing import NamedTuple

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.liveness import live_encoder_units, live_llm_microbatches
from bigmac_lightning.schedule.placing.list_scheduling import EPS, Tasks, justify, list_schedule
from bigmac_lightning.schedule.placing.nested_orders import NestedOrders
from bigmac_lightning.schedule.placing.nesting import Cut, consistent_cuts, nest
from bigmac_lightning.schedule.placing.policy_input import PolicyInput
from bigmac_lightning.schedule.placing.swaps import swap
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import Timeline, durations, simulate
from bigmac_lightning.schedule.workload import Workload

OVERSHOOTS = (0.5, 0.0, 1.0)
PASSES = 120_000
"""About as many passes are made as this goes into the plan's number of actions, so that planning time stays small."""
FEWEST_PASSES, MOST_PASSES, LEAST_TO_TURN = 6, 600, 30
POLISHED, SWAPPED = 10, 4
"""How many of the best schedules are improved by justification, and by swaps."""


def fill(plan: Plan, given: PolicyInput) -> list[list[Action]]:
    """Every rank's actions: the bare backbone of `plan` with its nested work in bubbles.

    Args:
        plan: its lists hold the bare backbone.
        given: by default 2 encoder units may be alive, or 3 with a generator, or what the cut takes if that is more.
            Pieces of encoder shares do not get much shorter than half a stage's forward. (The generator's shares are
            not cut: that gains nothing.)

    Returns: the cut if nothing better is found, also where the cut has more encoder units alive than allowed.
    """
    workload, limit = given.workload, given.max_encoder_units
    cut = replace(plan, ranks=nest(plan, given.bare, workload=workload))
    if limit is None:
        peak = max((units for row in live_encoder_units(cut, workload) for units in row), default=0.0)
        limit = max(default_limit(plan), peak)
    starts = _starts(cut, workload, given.pieces)
    found = [_Search(start, plan, given.bare, workload, limit).run() for start in starts]
    return min((lists for lists in found if lists is not None), default=(0.0, cut.ranks), key=lambda lists: lists[0])[1]


def default_limit(plan: Plan) -> float:
    """Encoder units that may be alive if nothing else is said, and the cut needs no more."""
    return 3.0 if "G" in plan.costs.kinds else 2.0


def _starts(cut: Plan, workload: Workload | None, pieces: int | Sequence[Sequence[int]]) -> list[Plan]:
    """The cut plan, and the same with its encoder shares in pieces, if any is long enough for that."""
    half = min(cut.cost("F", stage) for stage in range(cut.stages)) / 2
    ranks: list[list[Action]] = []
    for rank, (actions, times) in enumerate(zip(cut.ranks, durations(cut, workload), strict=True)):
        number = {
            action.index: max(
                1, min(pieces if isinstance(pieces, int) else pieces[action.index][rank], ceil(time / half - EPS))
            )
            for action, time in zip(actions, times, strict=True)
            if action.kind == "EF"
        }
        ranks.append(
            [
                replace(action, piece=piece, pieces=count)
                for action in actions
                for count in (number[action.index] if action.kind in ("EF", "EB") else 1,)
                for piece in range(count)
            ]
        )
    return [cut] if ranks == cut.ranks else [replace(cut, ranks=ranks), cut]


class _Schedule(NamedTuple):
    """A schedule; the shorter one sorts first, then the one that was found first."""

    makespan: float
    number: int
    starts: list[float]
    tasks: Tasks


class _Search:
    """Looks for a short schedule of a cut plan's actions.

    Attributes:
        budget: how many passes over all tasks may still be made.
        best: the shortest schedule found.
        floor: no schedule is shorter.
    """

    def __init__(
        self, cut: Plan, plan: Plan, bare: Timeline, workload: Workload | None, max_encoder_units: float
    ) -> None:
        self.cut = cut
        self.flow = Dataflow(cut)
        self.lengths = [time for row in durations(cut, workload) for time in row]
        self.main = {number for number, action in enumerate(self.flow.actions) if not action.nested}
        times = {
            action: start
            for actions, starts in zip(plan.ranks, bare.starts, strict=True)
            for action, start in zip(actions, starts, strict=True)
        }
        self.expected = [times.get(action, 0.0) for action in self.flow.actions]
        cuts = consistent_cuts(plan, bare, workload=workload)
        self.cuts = [cut for cut in cuts if any(plan.shares(cut.kind)[cut.group])]
        self.orders = NestedOrders(plan, self.cuts, max_encoder_units, workload)
        self.cut_starts = [start for row in simulate(cut, workload, flow=self.flow).starts for start in row]
        self.capacity = [max(row, default=0.0) for row in live_llm_microbatches(plan)]
        self.budget = min(MOST_PASSES, max(FEWEST_PASSES, PASSES // max(1, len(self.lengths))))
        self.best: _Schedule | None = None
        self.floor = 0.0
        self.sequences: dict[Tasks, list[Cut]] = {}

    def run(self) -> tuple[float, list[list[Action]]] | None:
        """Makespan and lists of the best schedule; ``None`` if there is none within the limit."""
        whole = self.budget
        seeds = self._seeds()
        for number, seed in enumerate(seeds[:POLISHED]):
            if number and self.budget < whole // 2:
                break
            starts = self._polish(seed.tasks, seed.starts)
            seeds[number] = _Schedule(seed.tasks.makespan(starts), seed.number, starts, seed.tasks)
        seeds.sort()
        for seed in seeds[: 2 * (whole > LEAST_TO_TURN)]:
            self._turn(seed.tasks, seed.starts, whole // 4)
        if self.best is None:
            return None
        self._reorder(whole // 4)
        seeds = [self.best, *seeds[: SWAPPED - 1]]
        for left, seed in zip(range(len(seeds), 0, -1), seeds, strict=True):
            passes = self.budget // (2 * left)
            if passes < 1 or self._good_enough():
                break
            starts = swap(seed.tasks, seed.starts, passes, self.floor)
            self.budget -= 2 * passes
            self._consider(seed.tasks, starts)
        return self.best.makespan, self._lists(self.best.starts)

    def _seeds(self) -> list["_Schedule"]:
        """The cut, and what list scheduling makes of each sequence of nested actions; the shortest first."""
        seeds: list[_Schedule] = []
        most = max(1, self.budget // 3)
        for sequence in self.orders.sequences():
            tasks = self._tasks(sequence)
            if not seeds and self.budget > LEAST_TO_TURN:
                self.floor = tasks.floor()
            if sequence == self.cuts:
                seeds.append(_Schedule(self._consider(tasks, self.cut_starts), len(seeds), self.cut_starts, tasks))
            for due in self._dues(tasks):
                for overshoot in OVERSHOOTS:
                    if len(seeds) >= most or self._good_enough():
                        return sorted(seeds)
                    starts = list_schedule(tasks, due, self.expected, overshoot)
                    if starts is None:
                        break
                    if all(starts != seed.starts for seed in seeds):
                        seeds.append(_Schedule(self._consider(tasks, starts), len(seeds), starts, tasks))
        return sorted(seeds)

    def _good_enough(self) -> bool:
        return self.best is not None and self.best.makespan <= self.floor + EPS

    def _consider(self, tasks: Tasks, starts: list[float]) -> float:
        makespan = tasks.makespan(starts)
        self.budget -= 1
        if self.best is None or makespan < self.best.makespan - EPS:
            self.best = _Schedule(makespan, 0, starts, tasks)
        return makespan

    def _polish(self, tasks: Tasks, starts: list[float]) -> list[float]:
        """Right and left justification, until nothing is gained."""
        mirrored = tasks.mirrored()
        while self.budget > 0 and not self._good_enough():
            before = tasks.makespan(starts)
            right = mirrored.mirror(justify(mirrored, tasks.mirror(starts)))
            starts = justify(tasks, right)
            self.budget -= 1
            if self._consider(tasks, starts) > before - EPS:
                break
        return starts

    def _turn(self, tasks: Tasks, starts: list[float], passes: int) -> None:
        """List scheduling backwards from the end, and forwards again, as long as something is gained."""
        least = self.budget - passes
        mirrored = tasks.mirrored()
        expected = mirrored.earliest(self.main)
        gained = True
        while gained and self.budget > least and not self._good_enough():
            gained, before = False, tasks.makespan(starts)
            for overshoot in OVERSHOOTS:
                back = list_schedule(mirrored, tasks.mirror(starts), expected, overshoot)
                if back is None or self.budget <= least:
                    break
                left = justify(tasks, mirrored.mirror(back))
                self._consider(tasks, left)
                for again in OVERSHOOTS:
                    forward = list_schedule(tasks, left, self.expected, again)
                    if forward is not None and self.budget > least:
                        left_again = self._polish(tasks, forward)
                        if tasks.makespan(left_again) < before - EPS:
                            starts, before, gained = left_again, tasks.makespan(left_again), True

    def _reorder(self, passes: int) -> None:
        """Neighbours in the sequence of nested actions change places, as long as something is gained."""
        assert self.best is not None
        least, reach = self.budget - passes, 3 * max((self.lengths[number] for number in self.main), default=0.0)
        gained = True
        while gained:
            gained, (before, _, starts, tasks) = False, self.best
            for spot, (one, other) in enumerate(pairwise(self.sequences[tasks])):
                sequence = list(self.sequences[tasks])
                sequence[spot : spot + 2] = [other, one]
                if one.kind == other.kind or not self.orders.keeps_limit(sequence):
                    continue
                if self.budget <= least or self._good_enough():
                    return
                due = [
                    start - reach * ((action.kind, action.index) == (other.kind, other.group))
                    for start, action in zip(starts, self.flow.actions, strict=True)
                ]
                reordered = self._tasks(sequence)
                found = list_schedule(reordered, due, self.expected, OVERSHOOTS[0])
                self.budget -= 2
                if found is not None:
                    self._polish(reordered, found)
                if self.best.makespan < before - EPS:
                    gained = True
                    break

    def _tasks(self, sequence: list[Cut]) -> Tasks:
        place = {(cut.kind, cut.group): position for position, cut in enumerate(sequence)}
        arcs = [(need, number) for number, needs in enumerate(self.flow.needs) for need in needs]
        chains: list[list[list[int]]] = []
        for rank in range(len(self.cut.ranks)):
            numbers = range(self.flow.first[rank], self.flow.first[rank + 1])
            kinds = {number: self.flow.actions[number].kind for number in numbers}
            nested = [number for number in numbers if self.flow.actions[number].nested]
            nested.sort(
                key=lambda number: place[kinds[number], self.flow.actions[number].index]
            )  # stable: pieces in order
            main = [n for n in numbers if n in self.main and kinds[n] != "W"]
            halves = {self.flow.needs[n][0]: n for n in numbers if kinds[n] == "W"}
            weights = [halves[n] for n in main if n in halves]
            chains.append([main, nested, weights])
            arcs += self._memory_arcs(rank, main, weights)
        tasks = Tasks(self.lengths, self.flow.ranks, chains, arcs, self.cut.costs.latency)
        self.sequences[tasks] = sequence
        return tasks

    def _memory_arcs(self, rank: int, main: list[int], weights: list[int]) -> list[tuple[int, int]]:
        """Where a forward takes the place in memory that a weight gradient frees."""
        capacity = round(self.capacity[rank] * self.cut.virtual_stages)
        held, freed, arcs = 0, 0, []
        waiting = {self.flow.needs[weight][0] for weight in weights}
        for number in main if weights else []:
            kind = self.flow.actions[number].kind
            held += 1 if kind == "F" else 0 if number in waiting else -1
            while held - freed > capacity:
                freed += 1
            if kind == "F" and freed:
                arcs.append((weights[freed - 1], number))
        return arcs

    def _dues(self, tasks: Tasks) -> list[list[float]]:
        """When each action should start at the latest, in times of the bare backbone: by the rule of the cuts, which
        is about starts, and by the first action that needs the work, which is about ends."""
        actions = self.flow.actions
        needing: dict[int, float] = {}
        for number, needs in enumerate(self.flow.needs):
            for need in needs:
                if actions[need].nested and not actions[number].nested:
                    needing[need] = min(needing.get(need, inf), self.expected[number])
        cut_times = {(cut.kind, cut.group): cut.time for cut in self.cuts}
        dues: list[list[float]] = []
        for by_ends in (False, True):
            due = [start + by_ends * length for start, length in zip(self.expected, self.lengths, strict=True)]
            for number, action in enumerate(actions):
                if action.kind == "W" or action.kind == "EB":
                    due[number] = inf
                elif action.nested:
                    due[number] = needing.get(number, inf) if by_ends else cut_times[action.kind, action.index]
            for _, nested, _ in tasks.chains:  # nothing is due later than what follows it
                for before, after in zip(nested[-2::-1], nested[::-1], strict=False):
                    due[before] = min(due[before], due[after])
            dues.append(due)
        return dues

    def _lists(self, starts: list[float]) -> list[list[Action]]:
        """Every rank's actions in order of time."""
        middle = [start + length / 2 for start, length in zip(starts, self.lengths, strict=True)]
        return [
            [
                self.flow.actions[n]
                for n in sorted(range(self.flow.first[r], self.flow.first[r + 1]), key=middle.__getitem__)
            ]
            for r in range(len(self.cut.ranks))
        ]
