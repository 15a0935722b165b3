"""The nesting pass: puts encoder and generator work into the pauses of consistent cuts of any LLM schedule.

A cut is a moment of the bare schedule. Whatever starts at or after it starts later by the length of the pause, on
every rank; no dependency breaks, because nothing from after the cut is needed before it. So each pause costs its own
length and nothing more, whether or not the ranks' running actions end at the same moment (BigMac, arXiv 2605.25451).

Knows LLM order, times and groups; knows nothing of policies or memory limits.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from bigmac_lightning.schedule.action import Action, Kind
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import Timeline, durations
from bigmac_lightning.schedule.workload import Workload

SLACK = 0.1
"""Share of the shortest LLM action by which an encoder forward comes earlier, and a generator later, than it must.

Where several ranks act at the very same moment of the schedule, messages then have a whole action's time to travel.
"""

_RANK_AT_EQUAL_TIME: dict[Kind, int] = {"EB": 0, "G": 1, "EF": 2}  # free memory before taking more


@dataclass(frozen=True)
class Cut:
    """A moment of the bare schedule at which a group's work of one kind is put in.

    Attributes:
        time: actions that start at or after it come after the work.
        kind: EF, EB or G.
        group: whose work.
    """

    time: float
    kind: Kind
    group: int


def consistent_cuts(
    plan: Plan, bare: Timeline, kinds: Collection[Kind] = ("EF", "EB", "G"), workload: Workload | None = None
) -> list[Cut]:
    """The cuts of all groups in order of time; at equal times first EB, then G, then EF.

    Args:
        plan: its lists hold the bare backbone.
        bare: the simulated bare backbone.
        kinds: which work is to be nested; kinds that do not occur are left out.
        workload: see ``simulate.durations``.

    Raises:
        ValueError: if a group's generator work has no place, as too few microbatches are in flight.
    """
    latency, slack = plan.costs.latency, _slack(plan, workload)
    starts: dict[tuple[str, int, int], float] = {}
    ends: dict[tuple[str, int, int], float] = {}
    for actions, row_starts, row_ends in zip(plan.ranks, bare.starts, bare.ends, strict=True):
        for action, start, end in zip(actions, row_starts, row_ends, strict=True):
            assert action.stage is not None, f"{action} is already nested"
            key = ("B" if action.kind == "I" else action.kind, action.stage, action.index)
            starts[key], ends[key] = start, end
    longest = max(time for row in durations(plan, workload) for time in row)
    cuts: list[Cut] = []
    for g, group in enumerate(plan.groups):
        if "EF" in kinds and "EF" in plan.costs.kinds:
            # the features must be at stage 0 when it starts, also those of a rank whose running action ends last
            due = min(starts["F", 0, microbatch] for microbatch in group)
            cuts.append(Cut(due - longest - slack if g else float("-inf"), "EF", g))
        if "G" in kinds and "G" in plan.costs.kinds:
            cuts.append(_generator_cut(plan, g, starts, ends, slack))
        if "EB" in kinds and "EB" in plan.costs.kinds:
            cuts.append(Cut(max(ends["B", 0, microbatch] for microbatch in group) + latency, "EB", g))
    return _sorted(cuts, _tolerance(plan, workload))


def nest(
    plan: Plan, bare: Timeline, kinds: Collection[Kind] = ("EF", "EB", "G"), workload: Workload | None = None
) -> list[list[Action]]:
    """Every rank's actions: the bare backbone of `plan`, with the work of these kinds put in at its cuts.

    Ranks whose share is zero get no action. Arguments and errors as ``consistent_cuts``.
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


def _generator_cut(
    plan: Plan,
    g: int,
    starts: dict[tuple[str, int, int], float],
    ends: dict[tuple[str, int, int], float],
    slack: float,
) -> Cut:
    """After the last stage's forward of the group, and before its first backward."""
    last, group = plan.stages - 1, plan.groups[g]
    known = max(ends["F", last, microbatch] for microbatch in group)
    if "B" not in plan.costs.kinds:
        return Cut(known + slack, "G", g)
    due = min(starts["B", last, microbatch] for microbatch in group)
    if due < known:
        raise ValueError(
            f"extra_in_flight is too small for {plan.backbone}: its last stage needs the generator's gradients of "
            f"group {g} before it has done the forwards of this group's {len(group)} microbatches; "
            f"expected at least {max(len(group) - 1, 1)}, or the default"
        )
    return Cut(min(known + slack, due), "G", g)


def _slack(plan: Plan, workload: Workload | None) -> float:
    return plan.costs.latency + SLACK * min(time for row in durations(plan, workload) for time in row)


def _tolerance(plan: Plan, workload: Workload | None) -> float:
    """Times nearer than this are equal: far below any action's length, far above rounding errors."""
    return 1e-6 * min(time for row in durations(plan, workload) for time in row)


def _sorted(cuts: list[Cut], tolerance: float) -> list[Cut]:
    """In order of time; times that differ by rounding errors are made equal first."""
    cuts = sorted(cuts, key=lambda cut: cut.time)
    for later in range(1, len(cuts)):
        if cuts[later].time - cuts[later - 1].time < tolerance:
            cuts[later] = replace(cuts[later], time=cuts[later - 1].time)
    return sorted(cuts, key=lambda cut: (cut.time, _RANK_AT_EQUAL_TIME[cut.kind], cut.group))
