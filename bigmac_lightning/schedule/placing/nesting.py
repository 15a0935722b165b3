"""The nesting pass: inserts encoder and generator work at consistent cuts of any LLM schedule (BigMac, arXiv
2605.25451).

A cut is a point in time of the bare schedule. All actions that start at or after it are delayed by the same time, the
pause, on every rank. No dependency breaks, because no action before the cut needs one after it. So a pause makes the
schedule longer by exactly its own length, even if the ranks' running actions end at different times, and each rank can
execute its share of a group's work in the pause.
"""

from collections.abc import Collection
from dataclasses import replace
from math import inf

from bigmac_lightning.schedule.action import Action, Kind
from bigmac_lightning.schedule.placing.common_cuts import Window, common_cuts, encoder_windows
from bigmac_lightning.schedule.placing.cut import Cut
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import Timeline, durations
from bigmac_lightning.schedule.workload import Workload

SLACK = 0.1
"""Fraction of the shortest LLM action by which the cut of an EF is earlier, and the cut of a G later, than necessary.

With even costs, ranks start many actions at the same time. This margin puts the G after an action that starts just when
the G's input is ready, so that the message has the whole time of that action to arrive; the same holds for an EF and
the start of stage 0. The value was chosen, not measured: it must be above rounding errors and below 1.
"""


def consistent_cuts(
    plan: Plan, bare: Timeline, kinds: Collection[Kind] = ("EF", "EB", "G"), workload: Workload | None = None
) -> list[Cut]:
    """Return the cuts of all groups in order of time; at equal times EB comes first, then G, then EF.

    Kinds of work inside which ranks meet have common cuts, see ``common_cuts``.

    Args:
        plan: a plan whose lists have only the bare backbone's actions.
        bare: the simulated timeline of that backbone.
        kinds: kinds of the work to be nested; kinds that do not occur in the plan are left out.
        workload: the work of each microbatch, see ``simulate.durations``.

    Raises:
        ValueError: too few microbatches are in flight for the generator: the last stage must run its first backward of
            a group before it has forwarded the whole group.
    """
    latency, slack = plan.costs.latency, _slack(plan, workload)
    starts: dict[tuple[str, int, int], float] = {}
    ends: dict[tuple[str, int, int], float] = {}
    for actions, row_starts, row_ends in zip(plan.ranks, bare.starts, bare.ends, strict=True):
        for action, start, end in zip(actions, row_starts, row_ends, strict=True):
            assert action.stage is not None, f"{action} is already nested"
            key = ("B" if action.kind == "I" else action.kind, action.stage, action.index)
            starts[key], ends[key] = start, end
    tolerance, longest = _tolerance(plan, workload), max(time for row in durations(plan, workload) for time in row)
    kinds = [kind for kind in kinds if kind in plan.costs.kinds]
    due = [min(starts["F", 0, m] for m in group) for group in plan.groups] if "EF" in kinds else []
    ready = [max(ends["B", 0, m] for m in group) + latency for group in plan.groups] if "EB" in kinds else []
    generated = [_generator_window(plan, g, starts, ends) for g in range(len(plan.groups))] if "G" in kinds else []
    cuts, windows = list[Cut](), list[Window]()
    if "EF" in plan.meeting:  # stage 0 waits for all ranks, which end together
        windows += encoder_windows([time - latency if g else -inf for g, time in enumerate(due)], ready)
    else:
        # A rank that is busy at the cut begins its EF when its running action ends, at most `longest` later. Its
        # features must still arrive before stage 0 starts on the group.
        cuts += [Cut(time - longest - slack if g else -inf, "EF", g) for g, time in enumerate(due)]
        cuts += [Cut(time, "EB", g) for g, time in enumerate(ready)]
    if "G" in plan.meeting:
        windows += [Window(min(time + latency, due), due, "G", g) for g, (time, due) in enumerate(generated)]
    else:
        cuts += [Cut(min(time + slack, due), "G", g) for g, (time, due) in enumerate(generated)]
    return _sorted(cuts + common_cuts(windows, bare, tolerance), tolerance)


def nest(
    plan: Plan, bare: Timeline, kinds: Collection[Kind] = ("EF", "EB", "G"), workload: Workload | None = None
) -> list[list[Action]]:
    """Return every rank's actions: the bare backbone of `plan`, with the work of these kinds inserted at its cuts.

    A rank whose share of a group's work is 0 gets no action for it. Arguments and errors are those of
    ``consistent_cuts``.
    """
    cuts, tolerance = consistent_cuts(plan, bare, kinds, workload), _tolerance(plan, workload)
    ranks: list[list[Action]] = []
    for rank, actions in enumerate(plan.ranks):
        merged: list[Action] = []
        position = 0
        for cut in cuts:
            while position < len(actions) and bare.starts[rank][position] < cut.time - tolerance:
                merged.append(actions[position])
                position += 1
            if plan.shares(cut.kind)[cut.group][rank] > 0:
                merged.append(Action(cut.kind, cut.group))
        ranks.append(merged + actions[position:])
    return ranks


def _generator_window(
    plan: Plan, g: int, starts: dict[tuple[str, int, int], float], ends: dict[tuple[str, int, int], float]
) -> tuple[float, float]:
    """Return when group g's G can run: after the last stage's forwards of the group and before its first backward.

    `starts` and `ends` are the times in the bare schedule by (kind, stage, microbatch), where "B" stands for I as well.
    """
    last, group = plan.stages - 1, plan.groups[g]
    available = max(ends["F", last, microbatch] for microbatch in group)
    if "B" not in plan.costs.kinds:
        return available, inf
    due = min(starts["B", last, microbatch] for microbatch in group)
    if due < available:
        raise ValueError(
            f"extra_in_flight is too small for {plan.backbone}: its last stage needs the generator's gradients of "
            f"group {g} before it has forwarded this group's {len(group)} microbatches; "
            f"expected at least {max(len(group) - 1, 1)}, or the default"
        )
    return available, due


def _slack(plan: Plan, workload: Workload | None) -> float:
    """Return the time by which cuts of EF and G differ from the necessary time: the latency and a little more."""
    return plan.costs.latency + SLACK * min(time for row in durations(plan, workload) for time in row)


def _tolerance(plan: Plan, workload: Workload | None) -> float:
    """Return the difference below which times count as equal: far below any action's time, far above rounding
    errors."""
    return 1e-6 * min(time for row in durations(plan, workload) for time in row)


def _sorted(cuts: list[Cut], tolerance: float) -> list[Cut]:
    """Return the cuts in order of time. Times that differ only by rounding errors are made equal first, so that the
    order of kinds decides."""
    cuts = sorted(cuts, key=lambda cut: cut.time)
    for later in range(1, len(cuts)):
        if cuts[later].time - cuts[later - 1].time < tolerance:
            cuts[later] = replace(cuts[later], time=cuts[later - 1].time)
    return sorted(cuts, key=lambda cut: cut.order)
