"""Checks a plan before it runs. The runtime relies on everything that is checked here and checks nothing again."""

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
    """Check that a plan is complete, can run without deadlock, and stays within the limits.

    The checks run in this order: the header; every action occurs exactly once, on the right rank; no action stands
    before one that it needs in the same list; nested actions stand in the same order on all ranks that share them (so
    that sharded replicas may use collectives inside them); no deadlock; the limits.

    **No deadlock** can occur, even if messages between two ranks pass through a blocking FIFO queue without buffers, if
    all actions can be put into *one* total order that respects every rank's list and every dependency. The argument:
    both ranks send and receive each message at the moment of that order right after the action that produces it. Each
    rank then executes its part of one common sequence, so both ends of every FIFO see the messages in the same order,
    and the earliest event of the sequence that has not happened yet can always happen, because its ranks have done
    everything before it. The simulation finds such an order (``Timeline.order``) exactly if lists and dependencies
    together have no cycle. If they have one, no order of sends and receives avoids the deadlock.

    Args:
        plan: any plan, for example one that was edited by hand.
        max_encoder_units: limit on the encoder units alive on a rank.
        max_llm_microbatches: limit on the LLM microbatches alive on a rank.
        workload: the work of each microbatch, see ``simulate.durations``; encoder units are then counted by it, too.
        memory: limit on the bytes in use on a rank.

    Returns: the plan's simulated timeline.

    Raises:
        PlanError: the plan breaks a rule or exceeds a limit; names the rank and the action where there is one.
        ValueError: the workload has another number of microbatches than the plan.
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
    """Check everything in a plan except its ranks' lists; raise ``PlanError`` if something is wrong."""
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
        raise PlanError(f"groups must contain each of the microbatches 0 .. {plan.microbatches - 1} exactly once")
    if not all(plan.groups):
        raise PlanError(f"groups: group {plan.groups.index([])} is empty; expected at least one microbatch")
    if len(plan.ranks) != size:
        raise PlanError(f"ranks has {len(plan.ranks)} lists; expected one for each of {size} ranks")
    check_stage_costs(plan)
    _check_shares(plan, "encoder_shares", plan.encoder_shares, "EF" in plan.costs.kinds)
    _check_shares(plan, "generator_shares", plan.generator_shares, "G" in plan.costs.kinds)


def check_stage_costs(plan: Plan) -> None:
    """Check the times of the stages; raise ``PlanError`` if something is wrong."""
    rows, costs = plan.stage_costs, plan.costs
    if rows and len(rows) != plan.stages:
        raise PlanError(f"stage_costs has {len(rows)} rows; expected one for each of {plan.stages} stages, or none")
    gradients_pass = "EB" in costs.kinds  # from the first stage (or the encoder) that needs gradients, all stages do
    for stage, row in enumerate(rows):
        if len(row) != 4 or not all(math.isfinite(time) and time >= 0 for time in row) or not row[0]:
            raise PlanError(f"stage_costs: stage {stage} has {row}; expected the times of F (above 0), B, I and W")
        gradients_pass = gradients_pass or row[1] > 0
        if "B" in costs.kinds and gradients_pass and not (row[1] and row[2]):
            raise PlanError(f"stage_costs: stage {stage} has no time for B or I, but gradients pass through it")


def _check_shares(plan: Plan, name: str, rows: list[list[float]], occurs: bool) -> None:
    """Check the shares of the encoder or the generator: one row per group if there is such work, none otherwise."""
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
    """Check that every action of the plan occurs exactly once, on the right rank, and that there are no others."""
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
    """Check that the plan has such an action, and has it on this rank."""
    if action.kind not in plan.costs.kinds:
        raise PlanError(f"rank {rank}: {action} cannot occur, as costs.{action.kind} or a cost that it depends on is 0")
    if action.stage is None:
        if action.index >= len(plan.groups):
            raise PlanError(f"rank {rank}: {action} does not exist; expected groups 0 .. {len(plan.groups) - 1}")
        if not plan.shares(action.kind)[action.index][rank]:
            raise PlanError(f"rank {rank}: {action} cannot be on this rank, whose share of the group's work is 0")
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
    """Check that a microbatch has an F on a stage and, if backwards occur there, either a B or an I and a W."""
    if Action("F", microbatch, stage) not in seen:
        raise PlanError(f"rank {rank}: {stage}F{microbatch} is missing")
    if not plan.occurs(Action("B", microbatch, stage)):
        return
    whole = Action("B", microbatch, stage) in seen
    halves = [kind for kind in ("I", "W") if Action(kind, microbatch, stage) in seen] if split else []
    if whole and halves:
        raise PlanError(
            f"rank {rank}: both {stage}B{microbatch} and {stage}{halves[0]}{microbatch} occur; "
            "expected either the full backward or its two halves"
        )
    expected = 1 + plan.occurs(Action("W", microbatch, stage))
    if not whole and len(halves) < expected:
        lacking = "B" if not halves else "W" if halves == ["I"] else "I"
        raise PlanError(f"rank {rank}: {stage}{lacking}{microbatch} is missing")


def _check_pieces(rank: int, actions: list[Action], kind: str, group: int, share: float) -> None:
    """Check that all pieces of one share occur. `actions` are the rank's actions of this kind and group."""
    if share and not actions:
        raise PlanError(f"rank {rank}: {kind}{group} is missing")
    if any(action.pieces != actions[0].pieces for action in actions):
        raise PlanError(f"rank {rank}: {kind}{group} is cut into pieces of different sizes; expected equal pieces")
    if actions and len(actions) < actions[0].pieces:
        lacking = min(set(range(actions[0].pieces)) - {action.piece for action in actions})
        raise PlanError(f"rank {rank}: {kind}{group}.{lacking}/{actions[0].pieces} is missing")


def _check_list_order(flow: Dataflow) -> None:
    """Check that no action stands before one that it needs in the same rank's list."""
    for number, needs in enumerate(flow.needs):
        rank = flow.ranks[number]
        for need in needs:
            if need > number and flow.ranks[need] == rank:
                raise PlanError(
                    f"rank {rank}: {flow.actions[number]} is placed before {flow.actions[need]}, which it needs"
                )


def _check_nested_order(plan: Plan) -> None:
    """Check that any two ranks have the nested actions that they share in the same order.

    The first piece of each action counts: further pieces may come later, also after other nested actions.
    """
    orders = [
        list(dict.fromkeys(f"{action.kind}{action.index}" for action in actions if action.nested))
        for actions in plan.ranks
    ]
    sets = [set(order) for order in orders]
    for one, other in combinations(range(len(orders)), 2):
        first = [text for text in orders[one] if text in sets[other]]
        second = [text for text in orders[other] if text in sets[one]]
        if first != second:
            a, b = next((a, b) for a, b in zip(first, second, strict=True) if a != b)
            raise PlanError(
                f"rank {other}: {b} is placed before {a}, rank {one} has them the other way round; "
                "expected nested actions in the same order on all ranks"
            )


def _check_limit(plan: Plan, alive: list[list[float]], limit: float, what: str) -> None:
    """Check a limit on the amount that is alive on a rank; `alive` has the amount during each action of each rank."""
    for rank, row in enumerate(alive):
        for action, amount in zip(plan.ranks[rank], row, strict=True):
            if amount > limit + 1e-9:
                raise PlanError(f"rank {rank}: {action} brings the live {what} to {amount:g}; the limit is {limit:g}")
