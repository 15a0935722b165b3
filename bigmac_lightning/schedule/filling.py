"""The filling pass: moves the nested actions of a cut plan into the bubbles of its backbone.

Keeps the backbone's order, except that weight gradients (W), which nobody waits for, may move within the backbone's
memory. Keeps the limit on live encoder units, and one sequence of nested actions for all ranks. Never longer than the
cut, which it starts from.

Knows plans, their dependencies and memory; knows nothing of how tasks are scheduled (see ``tasks``).
"""

from dataclasses import replace
from math import inf
from random import Random

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.liveness import live_encoder_units, live_llm_microbatches
from bigmac_lightning.schedule.nested_orders import NestedOrders
from bigmac_lightning.schedule.nesting import Cut, consistent_cuts, nest
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import Timeline, durations, simulate
from bigmac_lightning.schedule.tasks import EPS, Tasks, justify, list_schedule
from bigmac_lightning.schedule.workload import Workload

OVERSHOOTS = (0.5, 0.0, 1.0)
PASSES = 40_000
"""About as many passes are made as this goes into the plan's number of actions, so that planning time stays small."""


def fill(
    plan: Plan, bare: Timeline, workload: Workload | None = None, max_encoder_units: float | None = None
) -> list[list[Action]]:
    """Every rank's actions: the bare backbone of `plan` with its nested work in bubbles.

    Args:
        plan: its lists hold the bare backbone.
        bare: the simulated bare backbone.
        workload: see ``simulate.durations``.
        max_encoder_units: most encoder units that a rank may have alive; by default 2, or 3 with a generator, or what
            the cut takes if that is more.

    Returns: the cut if nothing better is found, also where the cut has more encoder units alive than allowed.
    """
    cut = replace(plan, ranks=nest(plan, bare, workload=workload))
    if max_encoder_units is None:
        peak = max((units for row in live_encoder_units(cut, workload) for units in row), default=0.0)
        max_encoder_units = max(3.0 if "G" in plan.costs.kinds else 2.0, peak)
    search = _Search(cut, plan, bare, workload, max_encoder_units)
    found = search.run()
    if found is None:
        return cut.ranks
    allowed = all(units <= max_encoder_units + EPS for row in live_encoder_units(cut, workload) for units in row)
    better = simulate(replace(plan, ranks=found), workload).makespan < simulate(cut, workload).makespan - EPS
    return found if better or not allowed else cut.ranks


class _Search:
    """Looks for a short schedule of a cut plan's actions."""

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
        self.budget = min(160, max(16, PASSES // max(1, len(self.lengths))))
        self.best: tuple[float, list[float], Tasks] | None = None
        self.sequences: dict[Tasks, list[Cut]] = {}

    def run(self) -> list[list[Action]] | None:
        """The lists of the best schedule; ``None`` if there is none within the limit."""
        seeds: list[tuple[float, int, list[float], Tasks]] = []
        for number, sequence in enumerate(self.orders.sequences()):
            tasks = self._tasks(sequence)
            for due in self._dues(tasks):
                for overshoot in OVERSHOOTS if number < 1 + (self.budget > 40) else OVERSHOOTS[:1]:
                    starts = list_schedule(tasks, due, self.expected, overshoot)
                    if starts is None:
                        break
                    if any(starts == seed[2] for seed in seeds):
                        continue
                    seeds.append((self._consider(tasks, starts), len(seeds), starts, tasks))
            if [(cut.kind, cut.group) for cut in self.cuts] == [(cut.kind, cut.group) for cut in sequence]:
                seeds.append((self._consider(tasks, self.cut_starts), len(seeds), self.cut_starts, tasks))
        polished: list[tuple[float, int, list[float], Tasks]] = []
        for _, number, starts, tasks in sorted(seeds, key=lambda seed: seed[:2])[: max(4, self.budget // 5)]:
            starts = self._polish(tasks, starts)
            polished.append((tasks.makespan(starts), number, starts, tasks))
        for _, _, starts, tasks in sorted(polished, key=lambda seed: seed[:2])[:2]:
            self._turn(tasks, starts)
        if self.best is not None:
            self._shake()
        return None if self.best is None else self._lists(self.best[1])

    def _consider(self, tasks: Tasks, starts: list[float]) -> float:
        makespan = tasks.makespan(starts)
        self.budget -= 1
        if self.best is None or makespan < self.best[0] + EPS:
            self.best = (makespan, starts, tasks)
        return makespan

    def _polish(self, tasks: Tasks, starts: list[float]) -> list[float]:
        """Right and left justification, until nothing is gained."""
        mirrored = tasks.mirrored()
        while self.budget > 0:
            before = tasks.makespan(starts)
            right = mirrored.mirror(justify(mirrored, tasks.mirror(starts)))
            starts = justify(tasks, right)
            self.budget -= 1
            if self._consider(tasks, starts) > before - EPS:
                break
        return starts

    def _turn(self, tasks: Tasks, starts: list[float]) -> None:
        """List scheduling backwards from the end, and forwards again, as long as something is gained."""
        mirrored = tasks.mirrored()
        expected = mirrored.earliest(self.main)
        gained = True
        while gained and self.budget > 0:
            gained, before = False, tasks.makespan(starts)
            for overshoot in OVERSHOOTS:
                back = list_schedule(mirrored, tasks.mirror(starts), expected, overshoot)
                if back is None or self.budget <= 0:
                    break
                left = justify(tasks, mirrored.mirror(back))
                self._consider(tasks, left)
                for again in OVERSHOOTS:
                    forward = list_schedule(tasks, left, self.expected, again)
                    if forward is not None and self.budget > 0:
                        left_again = self._polish(tasks, forward)
                        if tasks.makespan(left_again) < before - EPS:
                            starts, before, gained = left_again, tasks.makespan(left_again), True

    def _shake(self) -> None:
        """With what is left of the budget: neighbours in the sequence of nested actions change places, or their due
        times move at random; the same on every run."""
        assert self.best is not None
        chance = Random(0)
        reach = 3 * max((self.lengths[number] for number in self.main), default=0.0)
        while self.budget > 0:
            self.budget -= 1
            _, starts, tasks = self.best
            due, sequence = list(starts), list(self.sequences[tasks])
            if chance.random() < 0.5 and len(sequence) > 1:
                spot = chance.randrange(len(sequence) - 1)
                one, other = sequence[spot], sequence[spot + 1]
                sequence[spot : spot + 2] = [other, one]
                if one.kind == other.kind or not self.orders.keeps_limit(sequence):
                    continue
                tasks = self._tasks(sequence)
                for number, action in enumerate(self.flow.actions):
                    if (action.kind, action.index) == (other.kind, other.group):
                        due[number] -= reach
            else:
                moved = chance.choice((0.05, 0.2, 0.6))
                for number in range(len(due)):
                    if number not in self.main and chance.random() < moved:
                        due[number] += chance.gauss(0, reach)
            found = list_schedule(tasks, due, self.expected, chance.choice(OVERSHOOTS))
            if found is not None:
                self._polish(tasks, found)

    def _tasks(self, sequence: list[Cut]) -> Tasks:
        place = {(cut.kind, cut.group): position for position, cut in enumerate(sequence)}
        arcs = [(need, number) for number, needs in enumerate(self.flow.needs) for need in needs]
        chains: list[list[list[int]]] = []
        for rank in range(len(self.cut.ranks)):
            numbers = range(self.flow.first[rank], self.flow.first[rank + 1])
            kinds = {number: self.flow.actions[number].kind for number in numbers}
            nested = [number for number in numbers if self.flow.actions[number].nested]
            nested.sort(key=lambda number: place[kinds[number], self.flow.actions[number].index])
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
