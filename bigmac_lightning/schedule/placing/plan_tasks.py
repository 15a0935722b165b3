"""Converts a plan to tasks for the filling pass, and schedules of the tasks back to the ranks' lists."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.liveness import live_llm_microbatches
from bigmac_lightning.schedule.placing.cut import Cut
from bigmac_lightning.schedule.placing.tasks import EPS, Tasks
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import Timeline, durations
from bigmac_lightning.schedule.workload import Workload


def with_pieces(cut: Plan, workload: Workload | None, pieces: int | Sequence[Sequence[int]]) -> list[Plan]:
    """Return the plans to start from: the cut with its encoder shares in pieces, if a share is long enough for pieces,
    and the cut itself, because neither of them always leads to the better plan."""
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


class PlanTasks:
    """The actions of a cut plan as tasks, which are numbered as the actions in ``Dataflow``.

    Args:
        cut: the plan with all its actions.
        plan: the same plan with only the bare backbone's actions.
        bare: the simulated timeline of the bare backbone.
        workload: the work of each microbatch, where microbatches differ.
        cuts: the cuts of groups that have work.

    Attributes:
        flow: the dependencies of the actions.
        lengths: time of each action.
        main: the LLM's actions.
        longest: time of the longest LLM action.
        expected: start of each LLM action in the bare backbone; 0 for nested actions.
        llm_limit: per rank, the largest number of LLM microbatches alive in the bare backbone, which no schedule
            exceeds.
    """

    def __init__(self, cut: Plan, plan: Plan, bare: Timeline, workload: Workload | None, cuts: Sequence[Cut]) -> None:
        self.cut, self.cuts = cut, cuts
        self.flow = Dataflow(cut)
        self.lengths = [time for row in durations(cut, workload) for time in row]
        self.main = {number for number, action in enumerate(self.flow.actions) if not action.nested}
        self.longest = max((self.lengths[number] for number in self.main), default=0.0)
        times = {
            action: start
            for actions, starts in zip(plan.ranks, bare.starts, strict=True)
            for action, start in zip(actions, starts, strict=True)
        }
        self.expected = [times.get(action, 0.0) for action in self.flow.actions]
        self.llm_limit = [max(row, default=0.0) for row in live_llm_microbatches(plan)]

    def tasks(self, sequence: list[Cut]) -> Tasks:
        """Return the actions as tasks with this sequence of nested actions.

        Each rank has three chains: F, B and I in the backbone's order; nested actions in the order of the sequence;
        and W in the order of their Is.
        """
        position_of = {(cut.kind, cut.group): position for position, cut in enumerate(sequence)}
        arcs = [(need, number) for number, needs in enumerate(self.flow.needs) for need in needs]
        chains: list[list[list[int]]] = []
        for rank in range(len(self.cut.ranks)):
            numbers = range(self.flow.first[rank], self.flow.first[rank + 1])
            kinds = {number: self.flow.actions[number].kind for number in numbers}
            nested = [number for number in numbers if self.flow.actions[number].nested]
            # The sort is stable, so the pieces of a share remain in order.
            nested.sort(key=lambda number: position_of[kinds[number], self.flow.actions[number].index])
            main = [n for n in numbers if n in self.main and kinds[n] != "W"]
            weight_of = {self.flow.needs[n][0]: n for n in numbers if kinds[n] == "W"}
            weights = [weight_of[n] for n in main if n in weight_of]
            chains.append([main, nested, weights])
            arcs += self._memory_arcs(rank, main, weights)
        return Tasks(self.lengths, self.flow.ranks, chains, arcs, self.cut.costs.latency)

    def _memory_arcs(self, rank: int, main: list[int], weights: list[int]) -> list[tuple[int, int]]:
        """Return arcs from W actions to the F actions that may only start after them, because of the limit on live LLM
        microbatches.

        The arcs are the same for every schedule: when F, B and I of the backbone's order bring the number of live
        activations (each of one stage) above the limit, the next W in order must have freed one before.
        """
        limit = round(self.llm_limit[rank] * self.cut.virtual_stages)
        alive, freed, arcs = 0, 0, []
        split = {self.flow.needs[weight][0] for weight in weights}  # an I frees nothing: its W does
        for number in main if weights else []:
            kind = self.flow.actions[number].kind
            alive += 1 if kind == "F" else 0 if number in split else -1
            while alive - freed > limit:
                freed += 1
            if kind == "F" and freed:
                arcs.append((weights[freed - 1], number))
        return arcs

    def dues(self, tasks: Tasks) -> list[list[float]]:
        """Return two lists of due times for list scheduling, in times of the bare backbone.

        By the first rule, a nested action is due at its cut, and an LLM action at its start. By the second rule, a
        nested action is due when the first LLM action that needs it starts, and an LLM action at its end. EB and W are
        never due: they fill gaps only (an EB also becomes due if a nested action after it is).
        """
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
            for _, nested, _ in tasks.chains:  # a nested action is due no later than the next one in the sequence
                for before, after in zip(nested[-2::-1], nested[::-1], strict=False):
                    due[before] = min(due[before], due[after])
            dues.append(due)
        return dues

    def lists(self, starts: list[float]) -> list[list[Action]]:
        """Return every rank's actions in order of time. Sorting by the middle of each action keeps neighbours in order
        if one of them takes no time."""
        middle = [start + length / 2 for start, length in zip(starts, self.lengths, strict=True)]
        return [
            [
                self.flow.actions[n]
                for n in sorted(range(self.flow.first[r], self.flow.first[r + 1]), key=middle.__getitem__)
            ]
            for r in range(len(self.cut.ranks))
        ]
