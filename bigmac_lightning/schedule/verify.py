"""Checks a plan before it is run.

Knows what a runtime may rely on; knows nothing of how plans are made.
"""

import math
from itertools import combinations

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.liveness import live_encoder_units, live_llm_microbatches
from bigmac_lightning.schedule.plan import Plan, PlanError
from bigmac_lightning.schedule.simulate import Timeline, check_workload, simulate
from bigmac_lightning.schedule.workload import Workload


def verify(
    plan: Plan,
    max_encoder_units: float | None = None,
    max_llm_microbatches: float | None = None,
    workload: Workload | None = None,
    memory: MemoryBudget | None = None,
) -> Timeline:
    """Check that a plan is complete, can run, and stays within its limits.

    Checked in this order: the header; every action exactly once, on the right rank; nothing placed before what it
    needs in its own rank's list; nested actions in the same order on all ranks that share them (so that sharded
    replicas may use collectives inside them); no deadlock; memory.

    **No deadlock**, even if every directed pair of ranks is a blocking FIFO without buffers: it suffices that all
    actions can be put into *one* total order that respects every rank's list and every dependency. Let each message
    be sent, and received, at the moment of that order right after the action that gives it, on both ranks. Then
    each rank works off its part of one common sequence, so the two ends of every FIFO see the messages in the same
    order, and the earliest event of the sequence that has not happened yet can always happen: its ranks have done
    all that comes before. The simulation finds such an order (``Timeline.order``) exactly when lists and
    dependencies together have no cycle; if they have one, no order of sends and receives could help.

    Args:
        plan: any plan, also one edited by hand.
        max_encoder_units: most encoder units that a rank may have alive.
        max_llm_microbatches: most LLM microbatches that a rank may have in flight.
        workload: see ``simulate.durations``; also what encoder units are then measured by.
        memory: most bytes that a rank may use at any moment.

    Returns: the plan's simulated timeline.

    Raises:
        PlanError: names the rank and the action.
    """
    check_header(plan)
    check_workload(plan, workload)
    _check_completeness(plan)
    flow = Dataflow(plan)
    _check_list_order(flow)
    _check_nested_order(plan)
    timeline = simulate(plan, workload, flow=flow)
    if max_encoder_units is not None:
        _check_limit(plan, live_encoder_units(plan, workload), max_encoder_units, "encoder units")
    if max_llm_microbatches is not None:
        _check_limit(plan, live_llm_microbatches(plan), max_llm_microbatches, "LLM microbatches")
    if memory is not None:
        memory.check(plan, workload)
    return timeline


def check_header(plan: Plan) -> None:
    """Check everything about a plan but its ranks' lists; raises ``PlanError``."""
    size = plan.pipeline_parallel_size
    for name in ("pipeline_parallel_size", "virtual_stages", "microbatches"):
        if getattr(plan, name) < 1:
            raise PlanError(f"{name} is {getattr(plan, name)}; expected at least 1")
    if not plan.stage_rank or not all(0 <= rank < size for rank in plan.stage_rank):
        raise PlanError(f"stage_rank is {plan.stage_rank}; expected the rank, 0 .. {size - 1}, of each stage")
    for rank in range(size):
        if plan.stage_rank.count(rank) not in (0, plan.virtual_stages):
            raise PlanError(
                f"stage_rank gives rank {rank} {plan.stage_rank.count(rank)} stages; "
                f"expected {plan.virtual_stages}, or none if it has only encoder or generator work"
            )
    if sorted(microbatch for group in plan.groups for microbatch in group) != list(range(plan.microbatches)):
        raise PlanError(f"groups must hold each of the microbatches 0 .. {plan.microbatches - 1} exactly once")
    if not all(plan.groups):
        raise PlanError(f"groups: group {plan.groups.index([])} is empty; expected at least one microbatch")
    if len(plan.ranks) != size:
        raise PlanError(f"ranks has {len(plan.ranks)} lists; expected one for each of {size} ranks")
    check_stage_costs(plan)
    _check_shares(plan, "encoder_shares", plan.encoder_shares, "EF" in plan.costs.kinds)
    _check_shares(plan, "generator_shares", plan.generator_shares, "G" in plan.costs.kinds)


def check_stage_costs(plan: Plan) -> None:
    """Check the times of stages, where they differ; raises ``PlanError``."""
    rows, costs = plan.stage_costs, plan.costs
    if rows and len(rows) != plan.stages:
        raise PlanError(f"stage_costs has {len(rows)} rows; expected one for each of {plan.stages} stages, or none")
    needed = "EB" in costs.kinds
    for stage, row in enumerate(rows):
        if len(row) != 4 or not all(math.isfinite(time) and time >= 0 for time in row) or not row[0]:
            raise PlanError(f"stage_costs: stage {stage} has {row}; expected the times of F (above 0), B, I and W")
        needed = needed or row[1] > 0
        if "B" in costs.kinds and needed and not (row[1] and row[2]):
            raise PlanError(f"stage_costs: stage {stage} has no time for B or I, but gradients pass through it")


def _check_shares(plan: Plan, name: str, rows: list[list[float]], occurs: bool) -> None:
    expected = len(plan.groups) if occurs else 0
    if len(rows) != expected:
        reason = f"one for each of {expected} groups" if occurs else "none, as its costs are 0"
        raise PlanError(f"{name} has {len(rows)} rows; expected {reason}")
    for group, row in enumerate(rows):
        if len(row) != plan.pipeline_parallel_size:
            raise PlanError(f"{name}: group {group} has {len(row)} shares; expected one per rank")
        if not all(math.isfinite(share) and share >= 0 for share in row):
            raise PlanError(f"{name}: group {group} has the shares {row}; expected numbers of at least 0")
        if any(row) and abs(sum(row) - 1) > 1e-6:
            raise PlanError(f"{name}: the shares of group {group} add up to {sum(row):g}; expected 1 (or all 0)")


def _check_completeness(plan: Plan) -> None:
    kinds = plan.costs.kinds
    for rank, actions in enumerate(plan.ranks):
        stages = [stage for stage, owner in enumerate(plan.stage_rank) if owner == rank]
        seen: set[Action] = set()
        for action in actions:
            if action in seen:
                raise PlanError(f"rank {rank}: {action} occurs twice")
            seen.add(action)
            _check_belongs(plan, rank, action)
        split = any(action.kind in ("I", "W") for action in actions)
        for stage in stages:
            for microbatch in range(plan.microbatches):
                _check_microbatch(plan, rank, stage, microbatch, seen, split)
        for kind in ("EF", "EB", "G"):
            if kind in kinds:
                for group, row in enumerate(plan.shares(kind)):
                    _check_pieces(
                        rank, [a for a in actions if a.kind == kind and a.index == group], kind, group, row[rank]
                    )
        for action in seen:
            if action.kind == "EB" and Action("EF", action.index, None, action.piece, action.pieces) not in seen:
                raise PlanError(f"rank {rank}: {action} has no EF{str(action)[2:]}; expected the same pieces")


def _check_belongs(plan: Plan, rank: int, action: Action) -> None:
    """The action may occur at all, and on this rank."""
    if action.kind not in plan.costs.kinds:
        raise PlanError(f"rank {rank}: {action} cannot occur, as costs.{action.kind} or what it belongs to is 0")
    if action.stage is None:
        if action.index >= len(plan.groups):
            raise PlanError(f"rank {rank}: {action} is of no group; expected 0 .. {len(plan.groups) - 1}")
        if not plan.shares(action.kind)[action.index][rank]:
            raise PlanError(f"rank {rank}: {action} does not belong here: this rank's share of it is 0")
        return
    if action.stage >= plan.stages or action.index >= plan.microbatches:
        raise PlanError(
            f"rank {rank}: {action} does not exist; expected stages 0 .. {plan.stages - 1} "
            f"and microbatches 0 .. {plan.microbatches - 1}"
        )
    if not plan.occurs(action):
        raise PlanError(f"rank {rank}: {action} cannot occur, as the time of {action.kind} on this stage is 0")
    if plan.stage_rank[action.stage] != rank:
        raise PlanError(f"rank {rank}: {action} belongs to rank {plan.stage_rank[action.stage]}")


def _check_microbatch(plan: Plan, rank: int, stage: int, microbatch: int, seen: set[Action], split: bool) -> None:
    """One F; and one B, or one I and one W, where they occur."""
    if Action("F", microbatch, stage) not in seen:
        raise PlanError(f"rank {rank}: {stage}F{microbatch} is missing")
    if not plan.occurs(Action("B", microbatch, stage)):
        return
    whole = Action("B", microbatch, stage) in seen
    halves = [kind for kind in ("I", "W") if Action(kind, microbatch, stage) in seen] if split else []
    if whole and halves:
        raise PlanError(
            f"rank {rank}: both {stage}B{microbatch} and {stage}{halves[0]}{microbatch} are there; "
            "expected the whole backward or its two halves"
        )
    expected = 1 + plan.occurs(Action("W", microbatch, stage))
    if not whole and len(halves) < expected:
        lacking = "B" if not halves else "W" if halves == ["I"] else "I"
        raise PlanError(f"rank {rank}: {stage}{lacking}{microbatch} is missing")


def _check_pieces(rank: int, actions: list[Action], kind: str, group: int, share: float) -> None:
    """All pieces of one share."""
    if share and not actions:
        raise PlanError(f"rank {rank}: {kind}{group} is missing")
    if any(action.pieces != actions[0].pieces for action in actions):
        raise PlanError(f"rank {rank}: {kind}{group} is cut in pieces of different size")
    if actions and len(actions) < actions[0].pieces:
        lacking = min(set(range(actions[0].pieces)) - {action.piece for action in actions})
        raise PlanError(f"rank {rank}: {kind}{group}.{lacking}/{actions[0].pieces} is missing")


def _check_list_order(flow: Dataflow) -> None:
    for number, needs in enumerate(flow.needs):
        rank = flow.ranks[number]
        for need in needs:
            if need > number and flow.ranks[need] == rank:
                raise PlanError(
                    f"rank {rank}: {flow.actions[number]} is placed before {flow.actions[need]}, which it needs"
                )


def _check_nested_order(plan: Plan) -> None:
    """The first pieces of nested actions come in the same order on any two ranks that share them."""
    orders = [
        list(dict.fromkeys(f"{action.kind}{action.index}" for action in actions if action.nested))
        for actions in plan.ranks
    ]
    sets = [set(order) for order in orders]
    for one, other in combinations(range(len(orders)), 2):
        theirs = [text for text in orders[one] if text in sets[other]]
        ours = [text for text in orders[other] if text in sets[one]]
        if theirs != ours:
            a, b = next((a, b) for a, b in zip(theirs, ours, strict=True) if a != b)
            raise PlanError(
                f"rank {other}: {b} is placed before {a}, rank {one} has them the other way round; "
                "expected nested actions in the same order on all ranks"
            )


def _check_limit(plan: Plan, alive: list[list[float]], limit: float, what: str) -> None:
    for rank, row in enumerate(alive):
        for action, amount in zip(plan.ranks[rank], row, strict=True):
            if amount > limit + 1e-9:
                raise PlanError(f"rank {rank}: {action} brings the live {what} to {amount:g}; the limit is {limit:g}")
