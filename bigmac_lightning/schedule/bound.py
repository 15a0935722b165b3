"""A lower bound on the makespan of all plans with the same backbone, which shows how far a plan is from the optimum.

The bound holds for all plans whose ranks execute the same forwards and backwards (F, B, I) in the same order, with the
same groups, shares and costs, and with no more encoder units alive. The positions of the nested actions and of the
weight gradients (W) are free. Let x and y be F, B or I actions of a rank r, where x is y or comes before it. Then

    makespan >= head(x) + time of r's actions that can neither end before x starts nor start after y ends + tail(y).

head(x) is the length of the longest chain of dependencies (the orders of other ranks' F, B and I included) that must
end before x starts. tail(y) is the length of the longest such chain that can start only when y has ended. The following
work of rank r can be done before x or after y, and is therefore left out of the sum in the middle:

==  ================================================================================================================
EF  before x: all of it, but no more than the units that may be alive plus the units of the EBs that can precede x;
    after y: the EFs of groups of which rank r forwards no microbatch before y or in y
EB  before x: the EBs of groups whose backwards on r all precede x;
    after y: all of it, but no more than the units that may be alive plus the units of the EFs that can follow y
G   before x: the Gs of groups whose forwards on r all precede x;
    after y: the Gs of groups none of whose backwards on r precedes y or is y
W   before x: each W whose I precedes x; after y: all of it
==  ================================================================================================================

Idle time that dependencies force is counted once only, because the times before x, from x to y and after y do not
overlap. On 1F1B with even costs the bound equals the closed form in tests/schedule/test_bound.py.
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
    """Return a time below which no plan with this plan's backbone, groups, shares and costs can end.

    Args:
        plan: a verified plan.
        max_encoder_units: the limit on the encoder units alive on a rank of those plans; the default is the peak of
            this plan.
        workload: the work of each microbatch, see ``simulate.durations``.

    Returns: the bound, in the time unit of the plan's costs.
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
        rank_bound = _RankBound(plan, rank, lengths[row], group_units(plan, workload), max_encoder_units)
        bounds.append(rank_bound.bound(heads[row], tails[row]))
    return max(bounds)


class _RankBound:
    """The bound from one rank's actions.

    Args:
        plan: the plan.
        rank: the rank.
        lengths: time of each of the rank's actions.
        units: encoder units of each group on all ranks together.
        limit: the most encoder units that may be alive on the rank.

    Attributes:
        ordered: positions in the rank's list of its F, B and I actions.
        free: time of all other actions of the rank.
        before: per F, B or I action x, the time of the other actions that can be done before x.
        after: per F, B or I action y, the time of the other actions that can be done after y.
    """

    def __init__(self, plan: Plan, rank: int, lengths: list[float], units: list[float], limit: float) -> None:
        actions = plan.ranks[rank]
        self.ordered = [number for number, action in enumerate(actions) if _in_order(action)]
        self.lengths = lengths
        self.free = sum(lengths) - sum(lengths[number] for number in self.ordered)
        position_of = {actions[number]: position for position, number in enumerate(self.ordered)}
        forwards, backwards = _spans(plan.groups, position_of, ("F",)), _spans(plan.groups, position_of, ("B", "I"))
        times = {kind: [0.0] * len(plan.groups) for kind in ("EF", "EB", "G")}
        weights: list[tuple[float, float]] = []
        for action, length in zip(actions, lengths, strict=True):
            if action.nested:
                times[action.kind][action.index] += length
            elif action.kind == "W":
                weights.append((position_of[replace(action, kind="I")] + 1, length))
        shares = [row[rank] for row in plan.encoder_shares] or [0.0] * len(plan.groups)
        own_units = [size * share for size, share in zip(units, shares, strict=True)]
        all_units = sum(own_units)
        forward, backward = (sum(times[kind]) / all_units if all_units else 0.0 for kind in ("EF", "EB"))
        trained = "EB" in plan.costs.kinds

        early_backwards = self._up_to((last + 1, size) for (_, last), size in zip(backwards, own_units, strict=True))
        late_forwards = self._later((first, size) for (first, _), size in zip(forwards, own_units, strict=True))
        early_generator = self._up_to((last + 1, time) for (_, last), time in zip(forwards, times["G"], strict=True))
        late_generator = self._later((first, time) for (first, _), time in zip(backwards, times["G"], strict=True))
        early_weights = self._up_to(weights)
        all_weights = sum(time for _, time in weights)
        limit = limit if trained and not plan.recomputes else inf
        self.before = [
            forward * min(all_units, limit + eb) + backward * eb + g + w
            for eb, g, w in zip(early_backwards, early_generator, early_weights, strict=True)
        ]
        self.after = [
            backward * min(all_units, limit + ef) + forward * ef + g + all_weights
            for ef, g in zip(late_forwards, late_generator, strict=True)
        ]

    def bound(self, heads: list[float], tails: list[float]) -> float:
        """Return the largest bound over all pairs x and y, where the start and the end of the rank's list count too.

        One pass is enough: `begin` is the largest term that depends on x alone, over all x up to the current y.
        """
        best = begin = done = 0.0
        for position, number in enumerate(self.ordered):
            begin = max(begin, heads[number] - done - self.before[position])
            done += self.lengths[number]
            best = max(best, begin + self.free + done - self.after[position] + tails[number])
        return max(best, begin + self.free + done)

    def _up_to(self, amounts: Iterable[tuple[float, float]]) -> list[float]:
        """From (position, amount) pairs: per position, the sum of the amounts at this position or earlier."""
        steps = [0.0] * len(self.ordered)
        for position, amount in amounts:
            if position < len(steps):
                steps[int(position)] += amount
        return list(accumulate(steps))

    def _later(self, amounts: Iterable[tuple[float, float]]) -> list[float]:
        """From (position, amount) pairs: per position, the sum of the amounts at later positions."""
        pairs = list(amounts)
        total = sum(amount for _, amount in pairs)
        return [total - earlier for earlier in self._up_to(pairs)]


def _spans(
    groups: list[list[int]], position_of: dict[Action, int], kinds: tuple[str, ...]
) -> list[tuple[float, float]]:
    """Per group, the first and the last position of an action of these kinds on one of the group's microbatches;
    (inf, -1) if there is no such action."""
    group_of = {microbatch: g for g, group in enumerate(groups) for microbatch in group}
    spans: list[tuple[float, float]] = [(inf, -1)] * len(groups)
    for action, position in position_of.items():
        if action.kind in kinds:
            first, last = spans[group_of[action.index]]
            spans[group_of[action.index]] = (min(first, position), max(last, position))
    return spans


def _longest(order: list[int], needs: list[list[tuple[int, float]]], lengths: list[float]) -> list[float]:
    """For each action, the length of the longest chain of actions before it; `order` must respect all `needs`."""
    longest = [0.0] * len(lengths)
    for number in order:
        longest[number] = max((longest[n] + lengths[n] + delay for n, delay in needs[number]), default=0.0)
    return longest


def _in_order(action: Action) -> bool:
    """Whether the backbone fixes the action's position among the F, B and I actions of its rank."""
    return not action.nested and action.kind != "W"


def _arcs(flow: Dataflow, latency: float) -> list[list[tuple[int, float]]]:
    """For each action, the actions that must end before it starts, by dependency or by the backbone's order, each with
    the delay in between."""
    arcs = [
        [(need, latency if flow.ranks[need] != flow.ranks[number] else 0.0) for need in needs]
        for number, needs in enumerate(flow.needs)
    ]
    for rank in range(len(flow.first) - 1):
        numbers = [n for n in range(flow.first[rank], flow.first[rank + 1]) if _in_order(flow.actions[n])]
        for before, after in pairwise(numbers):
            arcs[after].append((before, 0.0))
    return arcs
