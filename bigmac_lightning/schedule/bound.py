"""A certificate: how much shorter than a plan any other plan with the same backbone could be at the most.

The bound holds for all plans whose ranks do the same forwards and backwards (F, B, I) in the same order, with the same
groups, shares and costs, and with no more encoder units alive; where the nested actions and the weight gradients (W)
stand is free. For a rank r and two of its F, B or I actions x and y, x before y or the same,

    makespan >= head(x) + work of r that cannot end before x starts nor start after y ends + tail(y).

head(x) is the longest chain of dependencies, other ranks' orders included, that must be over before x starts; tail(y)
the longest one that can only start when y has ended. Work that can be placed outside, and therefore is left out:

==  ==========================================================================================================
EF  before x: all of it, but no more than the units that may be alive, and those of EBs that can be before x;
    after y: that of groups none of whose microbatches rank r forwards up to y
EB  before x: that of groups all of whose backwards on r are before x;
    after y: all of it, but no more than the units that may be alive, and those of EFs that can be after y
G   before x: that of groups all of whose forwards on r are before x; after y: if none of their backwards is up to y
W   before x: where its I is before x; after y: all of it
==  ==========================================================================================================

No bubble that a chain of dependencies forces is counted twice, because before x, between the two, and after y are
different times. On 1F1B with even costs the bound is the closed form that tests/schedule/test_bound.py has.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, pairwise
from math import inf

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.liveness import group_units
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import durations, simulate
from bigmac_lightning.schedule.workload import Workload


def lower_bound(plan: Plan, max_encoder_units: float | None = None, workload: Workload | None = None) -> float:
    """No plan with this one's backbone, groups, shares and costs takes less time.

    Args:
        plan: a verified plan.
        max_encoder_units: the most encoder units that a rank of those plans may have alive; by default as many as
            this plan has at its peak.
        workload: see ``simulate.durations``.
    """
    flow, timeline = Dataflow(plan), simulate(plan, workload)
    if max_encoder_units is None:
        max_encoder_units = max(timeline.encoder_units, default=0.0)
    lengths = [time for row in durations(plan, workload) for time in row]
    order = [flow.first[rank] + position for rank, position in timeline.order]
    needs = _arcs(flow, plan.costs.latency)
    needed_by: list[list[tuple[int, float]]] = [[] for _ in lengths]
    for number, row in enumerate(needs):
        for need, delay in row:
            needed_by[need].append((number, delay))
    heads, tails = _longest(order, needs, lengths), _longest(order[::-1], needed_by, lengths)
    bounds = [max((heads[n] + lengths[n] + tails[n] for n in order), default=0.0)]
    for rank in range(len(plan.ranks)):
        row = slice(flow.first[rank], flow.first[rank + 1])
        work = _RankWork(plan, rank, lengths[row], group_units(plan, workload), max_encoder_units)
        bounds.append(work.bound(heads[row], tails[row]))
    return max(bounds)


class _RankWork:
    """The work of one rank, by where it can be done."""

    def __init__(self, plan: Plan, rank: int, lengths: list[float], units: list[float], most: float) -> None:
        actions = plan.ranks[rank]
        self.ordered = [number for number, action in enumerate(actions) if _in_order(action)]
        self.lengths = lengths
        self.free = sum(lengths) - sum(lengths[number] for number in self.ordered)
        place = {actions[number]: position for position, number in enumerate(self.ordered)}
        forwards, backwards = _spans(plan.groups, place, ("F",)), _spans(plan.groups, place, ("B", "I"))
        times = {kind: [0.0] * len(plan.groups) for kind in ("EF", "EB", "G")}
        weights: list[tuple[float, float]] = []
        for action, length in zip(actions, lengths, strict=True):
            if action.nested:
                times[action.kind][action.index] += length
            elif action.kind == "W":
                weights.append((place[replace(action, kind="I")] + 1, length))
        shares = [row[rank] for row in plan.encoder_shares] or [0.0] * len(plan.groups)
        held = [size * share for size, share in zip(units, shares, strict=True)]
        all_units = sum(held)
        forward, backward = (sum(times[kind]) / all_units if all_units else 0.0 for kind in ("EF", "EB"))
        trained = "EB" in plan.costs.kinds

        early_backwards = self._since((last + 1, size) for (_, last), size in zip(backwards, held, strict=True))
        late_forwards = self._until((first, size) for (first, _), size in zip(forwards, held, strict=True))
        early_generator = self._since((last + 1, time) for (_, last), time in zip(forwards, times["G"], strict=True))
        late_generator = self._until((first, time) for (first, _), time in zip(backwards, times["G"], strict=True))
        early_weights = self._since(weights)
        all_weights = sum(time for _, time in weights)
        most = most if trained and not plan.recomputes else inf
        self.before = [
            forward * min(all_units, most + eb) + backward * eb + g + w
            for eb, g, w in zip(early_backwards, early_generator, early_weights, strict=True)
        ]
        self.after = [
            backward * min(all_units, most + ef) + forward * ef + g + all_weights
            for ef, g in zip(late_forwards, late_generator, strict=True)
        ]

    def bound(self, heads: list[float], tails: list[float]) -> float:
        """The longest of head, work in between and tail, over all choices of x and y, or of the rank's very start and
        end in their place."""
        best = begin = done = 0.0
        for position, number in enumerate(self.ordered):
            begin = max(begin, heads[number] - done - self.before[position])
            done += self.lengths[number]
            best = max(best, begin + self.free + done - self.after[position] + tails[number])
        return max(best, begin + self.free + done)

    def _since(self, amounts: Iterable[tuple[float, float]]) -> list[float]:
        """Per position, the sum of the amounts whose own position is at most that."""
        steps = [0.0] * len(self.ordered)
        for position, amount in amounts:
            if position < len(steps):
                steps[int(position)] += amount
        return list(accumulate(steps))

    def _until(self, amounts: Iterable[tuple[float, float]]) -> list[float]:
        """Per position, the sum of the amounts whose own position is later."""
        chosen = list(amounts)
        total = sum(amount for _, amount in chosen)
        return [total - passed for passed in self._since(chosen)]


def _spans(groups: list[list[int]], place: dict[Action, int], kinds: tuple[str, ...]) -> list[tuple[float, float]]:
    """Per group, the first and the last place of an action of these kinds on one of its microbatches; (inf, -1) if
    there is none."""
    group_of = {microbatch: g for g, group in enumerate(groups) for microbatch in group}
    spans: list[tuple[float, float]] = [(inf, -1)] * len(groups)
    for action, position in place.items():
        if action.kind in kinds:
            first, last = spans[group_of[action.index]]
            spans[group_of[action.index]] = (min(first, position), max(last, position))
    return spans


def _longest(order: list[int], needs: list[list[tuple[int, float]]], lengths: list[float]) -> list[float]:
    """For each action, the longest chain of actions before it; `order` respects all needs."""
    longest = [0.0] * len(lengths)
    for number in order:
        longest[number] = max((longest[n] + lengths[n] + delay for n, delay in needs[number]), default=0.0)
    return longest


def _in_order(action: Action) -> bool:
    """Whether the backbone says where the action stands among others of its rank."""
    return not action.nested and action.kind != "W"


def _arcs(flow: Dataflow, latency: float) -> list[list[tuple[int, float]]]:
    """For each action, what must have ended before it, and the delay in between: dependencies and backbone order."""
    arcs = [
        [(need, latency if flow.ranks[need] != flow.ranks[number] else 0.0) for need in needs]
        for number, needs in enumerate(flow.needs)
    ]
    for rank in range(len(flow.first) - 1):
        numbers = [n for n in range(flow.first[rank], flow.first[rank + 1]) if _in_order(flow.actions[n])]
        for before, after in pairwise(numbers):
            arcs[after].append((before, 0.0))
    return arcs
