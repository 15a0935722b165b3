"""Runs a plan on paper: when every action starts and ends if each takes its time.

Knows costs, latency and dependencies; knows nothing of how the plan was made.
"""

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
    """A simulated plan. Lists per rank are parallel to ``plan.ranks``.

    Attributes:
        starts: per rank, the start time of each action.
        ends: per rank, the end time of each action.
        makespan: when the last action ends.
        bubbles: per rank, the idle time until the makespan.
        encoder_units: per rank, the most encoder units alive at any time.
        llm_microbatches: per rank, the most LLM microbatches in flight at any time.
        order: (rank, position) of all actions in one total order by end time, which respects all dependencies and
            every rank's list.
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
        """Idle time of all ranks, as a fraction of their time."""
        whole = self.makespan * len(self.bubbles)
        return sum(self.bubbles) / whole if whole else 0.0


def durations(plan: Plan, workload: Workload | None = None) -> list[list[float]]:
    """Per rank, the time of each action.

    Args:
        plan: its costs and shares give the times.
        workload: the work of each microbatch, where they differ: scales LLM actions and replaces the costs of
            encoder forwards and of the generator; encoder backwards take costs.EB / costs.EF times the forward.

    Where a plan recomputes, an encoder backward takes a forward's time more.

    Raises:
        ValueError: if the workload is of another number of microbatches.
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
    """Refuse, by ``ValueError``, a workload of another number of microbatches."""
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
    """Start every action as early as its rank's list and its dependencies allow.

    Args:
        plan: need not be verified.
        workload: see ``durations``.
        durations: the time of each action, if not that of the plan's costs; lists per rank.
        flow: the plan's dependencies, if they have been worked out already.

    Raises:
        PlanError: if the plan cannot progress; shows every rank's list around the action it is stuck at.
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

    start, end, ready = [0.0] * total, [0.0] * total, deque(n for n in range(total) if not waiting[n])
    progress: list[int] = []
    while ready:
        number = ready.popleft()
        progress.append(number)
        rank, ended = ranks[number], start[number] + length[number]
        end[number] = ended
        arrived = ended + latency
        for later in needed_by[number]:
            available = ended if ranks[later] == rank else arrived
            if available > start[later]:
                start[later] = available
            waiting[later] -= 1
            if not waiting[later]:
                ready.append(later)
        later = number + 1
        if later not in firsts:
            if ended > start[later]:
                start[later] = ended
            waiting[later] -= 1
            if not waiting[later]:
                ready.append(later)
    if len(progress) < total:
        raise PlanError(_stuck(plan, flow, set(progress)))

    progress.sort(key=end.__getitem__)  # stable: where end times are equal, what is needed stays first
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


_durations = durations  # the name that `simulate` can use beside its argument


def group_cost(plan: Plan, workload: Workload | None, kind: str, group: list[int]) -> float:
    """Time of a whole group's work of kind EF, EB or G on one rank, without any recomputation."""
    cost = getattr(plan.costs, kind)
    if workload is None or not cost:
        return cost * len(group)
    if kind == "EB":
        return workload.total("EF", group) * plan.costs.EB / plan.costs.EF if plan.costs.EF else 0.0
    return workload.total(kind, group)


def _stuck(plan: Plan, flow: Dataflow, done: set[int], around: int = 3) -> str:
    """The rank x step grid with the spot of each rank marked, and what is waited for."""
    spots: list[str] = []
    lines: list[str] = []
    for rank, actions in enumerate(plan.ranks):
        first = flow.first[rank]
        step = next((step for step in range(len(actions)) if first + step not in done), None)
        if step is None:
            lines.append(f"  rank {rank}: done")
            continue
        needs = [need for need in flow.needs[first + step] if need not in done]
        waits = ", ".join(f"{flow.actions[need]} of rank {flow.ranks[need]}" for need in needs)
        spots.append(f"rank {rank} at {actions[step]} for {waits}")
        shown = range(max(0, step - around), min(len(actions), step + around + 1))
        cells = [f">{actions[i]}<" if i == step else str(actions[i]) for i in shown]
        before, after = [".."] * (shown.start > 0), [".."] * (shown.stop < len(actions))
        lines.append(f"  rank {rank}, step {step}: {' '.join([*before, *cells, *after])}")
    return "\n".join([f"the plan cannot progress; waiting: {'; '.join(spots)}", *lines])
