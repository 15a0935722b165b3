"""Simulates a plan: computes when every action starts and ends, from costs, dependencies and latency."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.liveness import live_encoder_units, live_llm_microbatches
from bigmac_lightning.schedule.plan import Plan, PlanError
from bigmac_lightning.schedule.workload import Workload

LLM_KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


@dataclass
class Timeline:
    """The result of a simulation. Times are in the unit of the plan's costs; the step starts at 0.

    Attributes:
        starts: per rank, the start time of each action in its list.
        ends: per rank, the end time of each action in its list.
        makespan: end time of the last action.
        bubbles: per rank, its idle time between 0 and the makespan.
        encoder_units: per rank, the largest number of encoder units alive at any time.
        llm_microbatches: per rank, the largest number of LLM microbatches alive at any time.
        order: all actions as (rank, position in its list), sorted by end time. This total order respects all
            dependencies and every rank's list.
    """

    starts: list[list[float]]
    ends: list[list[float]]
    makespan: float
    bubbles: list[float]
    encoder_units: list[float]
    llm_microbatches: list[float]
    order: list[tuple[int, int]]

    @property
    def bubble_share(self) -> float:
        """Idle time of all ranks together, as a fraction of the makespan times the number of ranks."""
        whole = self.makespan * len(self.bubbles)
        return sum(self.bubbles) / whole if whole else 0.0


def durations(plan: Plan, workload: Workload | None = None) -> list[list[float]]:
    """Return, per rank, the time of each action in its list.

    If the plan recomputes, the time of an encoder backward includes that of the second encoder forward.

    Args:
        plan: its costs and shares give the times.
        workload: the work of each microbatch, where microbatches differ. It scales the times of F, B, I and W, and it
            replaces the costs of EF and G; an encoder backward takes costs.EB / costs.EF times as long as its forward.

    Raises:
        ValueError: the workload has another number of microbatches than the plan.
    """
    check_workload(plan, workload)
    llm_cost = [{kind: plan.cost(kind, stage) for kind in LLM_KINDS} for stage in range(plan.stages)]
    scale = [work.llm for work in workload.microbatches] if workload else [1.0] * plan.microbatches
    nested = ("EF", "EB", "G")
    nested_cost = {kind: [group_cost(plan, workload, kind, group) for group in plan.groups] for kind in nested}
    if plan.recomputes:
        nested_cost["EB"] = [sum(both) for both in zip(nested_cost["EF"], nested_cost["EB"], strict=True)]
    shares = {kind: plan.shares(kind) for kind in nested}
    return [
        [
            llm_cost[action.stage][action.kind] * scale[action.index]
            if action.stage is not None
            else nested_cost[action.kind][action.index] * shares[action.kind][action.index][rank] / action.pieces
            for action in actions
        ]
        for rank, actions in enumerate(plan.ranks)
    ]


def check_workload(plan: Plan, workload: Workload | None) -> None:
    """Raise ``ValueError`` if the workload has another number of microbatches than the plan."""
    if workload is not None and len(workload.microbatches) != plan.microbatches:
        raise ValueError(
            f"the workload has {len(workload.microbatches)} microbatches, the plan has {plan.microbatches}; "
            "expected the same number"
        )


def simulate(
    plan: Plan,
    workload: Workload | None = None,
    durations: Sequence[Sequence[float]] | None = None,
    flow: Dataflow | None = None,
) -> Timeline:
    """Simulate a plan in which every action starts as early as its rank's list and its dependencies allow.

    Args:
        plan: any plan; it need not be verified.
        workload: the work of each microbatch, see ``durations``.
        durations: per rank, the time of each action; by default ``durations(plan, workload)``.
        flow: the plan's dependencies, if the caller has already made them.

    Raises:
        PlanError: the plan would deadlock; the message shows each rank's list around the action that cannot start.
    """
    times = _durations(plan, workload) if durations is None else durations
    flow, latency = flow or Dataflow(plan), plan.costs.latency
    length = [time for row in times for time in row]
    total, ranks, firsts = len(flow.actions), flow.ranks, set(flow.first)
    waiting = [len(needs) + (number not in firsts) for number, needs in enumerate(flow.needs)]
    needed_by: list[list[int]] = [[] for _ in range(total)]
    for number, needs in enumerate(flow.needs):
        for need in needs:
            needed_by[need].append(number)

    start, end = [0.0] * total, [0.0] * total
    meetings = _Meetings(plan, flow, start, length)
    ready = deque(n for number in range(total) if not waiting[number] for n in meetings.ready(number))
    progress: list[int] = []
    while ready:
        number = ready.popleft()
        progress.append(number)
        rank, ended = ranks[number], start[number] + meetings.length(number)
        end[number] = ended
        arrived = ended + latency
        for later in needed_by[number]:
            available = ended if ranks[later] == rank else arrived
            if available > start[later]:
                start[later] = available
            waiting[later] -= 1
            if not waiting[later]:
                ready.extend(meetings.ready(later))
        later = number + 1
        if later not in firsts:
            if ended > start[later]:
                start[later] = ended
            waiting[later] -= 1
            if not waiting[later]:
                ready.extend(meetings.ready(later))
    if len(progress) < total:
        raise PlanError(_stuck(plan, flow, set(progress)))

    # The sort is stable, so that of actions with equal end times (costs near 0) the one that others need stays first.
    progress.sort(key=end.__getitem__)
    makespan = max(end, default=0.0)
    rows = [slice(flow.first[rank], flow.first[rank + 1]) for rank in range(len(plan.ranks))]
    return Timeline(
        starts=[start[row] for row in rows],
        ends=[end[row] for row in rows],
        makespan=makespan,
        bubbles=[max(0.0, makespan - sum(length[row])) for row in rows],
        encoder_units=[max(row, default=0.0) for row in live_encoder_units(plan, workload)],
        llm_microbatches=[max(row, default=0.0) for row in live_llm_microbatches(plan)],
        order=[flow.position(number) for number in progress],
    )


class _Meetings:
    """The actions in which ranks wait for each other: `Plan.meeting`.

    Args:
        starts: when each action can start; here it gets later for ranks that wait.
        lengths: the time that each action takes alone.
    """

    def __init__(self, plan: Plan, flow: Dataflow, starts: list[float], lengths: list[float]) -> None:
        self._starts, self._lengths = starts, lengths
        self._together: dict[int, list[int]] = {}
        found: dict[tuple[Kind, int, int], list[int]] = {}
        for number, action in enumerate(flow.actions if plan.meeting else ()):
            if action.kind in plan.meeting:
                self._together[number] = found.setdefault((action.kind, action.index, action.piece), [])
                self._together[number].append(number)
        self._expected = {number: len(together) for number, together in self._together.items()}

    def ready(self, number: int) -> Sequence[int]:
        """The actions that can start now that this one need not wait for its rank and its needs any more."""
        together = self._together.get(number)
        if together is None:
            return (number,)
        first = together[0]
        self._expected[first] -= 1
        if self._expected[first]:
            return ()
        start = max(self._starts[other] for other in together)
        for other in together:
            self._starts[other] = start
        return together

    def length(self, number: int) -> float:
        together = self._together.get(number)
        return self._lengths[number] if together is None else max(self._lengths[other] for other in together)


_durations = durations  # a second name, because `simulate` has an argument that is called `durations`


def group_cost(plan: Plan, workload: Workload | None, kind: str, group: list[int]) -> float:
    """Return the time of a whole group's EF, EB or G on one rank, not counting recomputation."""
    cost = getattr(plan.costs, kind)
    if workload is None or not cost:
        return cost * len(group)
    if kind == "EB":
        return workload.total("EF", group) * plan.costs.EB / plan.costs.EF if plan.costs.EF else 0.0
    return workload.total(kind, group)


def _stuck(plan: Plan, flow: Dataflow, done: set[int], around: int = 3) -> str:
    """Return the message for a deadlock: the action that each rank waits for, and each rank's list around its first
    action that cannot start, which is marked."""
    waiting: list[str] = []
    lines: list[str] = []
    for rank, actions in enumerate(plan.ranks):
        first = flow.first[rank]
        step = next((step for step in range(len(actions)) if first + step not in done), None)
        if step is None:
            lines.append(f"  rank {rank}: done")
            continue
        needs = [need for need in flow.needs[first + step] if need not in done]
        missing = ", ".join(f"{flow.actions[need]} of rank {flow.ranks[need]}" for need in needs)
        waiting.append(f"rank {rank} at {actions[step]} for {missing}")
        shown = range(max(0, step - around), min(len(actions), step + around + 1))
        cells = [f">{actions[i]}<" if i == step else str(actions[i]) for i in shown]
        before, after = [".."] * (shown.start > 0), [".."] * (shown.stop < len(actions))
        lines.append(f"  rank {rank}, step {step}: {' '.join([*before, *cells, *after])}")
    return "\n".join([f"the plan cannot progress; waiting: {'; '.join(waiting)}", *lines])
