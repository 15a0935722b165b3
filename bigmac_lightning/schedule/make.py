"""Makes plans: a backbone, with encoder and generator work placed around it by a policy."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.placing.disaggregated import at_stages, fastest, longer_stages, stage_ranks, whole_llm
from bigmac_lightning.schedule.placing.filling import default_limit
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.placing.policy_input import PolicyInput
from bigmac_lightning.schedule.placing.uneven_shares import uneven_shares
from bigmac_lightning.schedule.plan import Plan, even_groups, ramp_groups
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import Timeline, check_workload, group_cost, simulate
from bigmac_lightning.schedule.verify import check_header, check_stage_costs, verify


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Planning makes very many small objects and no cycles: looking for cycles among them would take half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def make_plan(request: PlanRequest) -> Plan:
    """Make a plan and verify it.

    Raises:
        ValueError: names the option, its value and what is expected; an option is "auto" (see ``choose``).
        PlanError: the plan breaks a rule or a limit; see ``verify``.
    """
    if request.has_auto:
        raise ValueError("backbone, virtual_stages or group_size is auto; expected values, as `choose` gives them")
    if request.own_ranks and request.stage_rank is None:
        return _on_fastest_ranks(request)
    policy, workload, size = POLICIES[request.policy], request.workload, request.pipeline_parallel_size
    plan = _without_actions(request)
    shortest = _with_backbone(plan, 0)
    check_header(shortest)
    on_all_ranks = shortest if len(set(plan.stage_rank)) == size else whole_llm(shortest)
    ideal = simulate(on_all_ranks, workload).makespan + _nested_time(plan, request) / size
    plan = _with_backbone(plan, request.extra_in_flight or 0)
    if request.extra_in_flight is None and policy.spread and "G" in plan.costs.kinds:
        plan = _with_generator_hidden(plan)
    bare = simulate(plan, workload)
    pieces = request.pieces if request.group_pieces is None else request.group_pieces
    given = PolicyInput(bare, workload, _most_encoder_units(bare, request), pieces)
    placed = replace(plan, ranks=policy.place(plan, given))
    if policy.uneven_shares and not (request.encoder_shares or request.generator_shares or workload):
        placed = _with_best_shares(placed, plan, given)
    timeline = verify(placed, request.max_encoder_units, request.max_llm_microbatches, workload, request.memory)
    peak = {"encoder_units": timeline.encoder_units, "llm_microbatches": timeline.llm_microbatches}
    return replace(placed, makespan=timeline.makespan, ideal=ideal, peak=peak)


def _on_fastest_ranks(request: PlanRequest) -> Plan:
    """The fastest plan of a policy whose stages may lie on some of the ranks; the limits are checked at the end only,
    so that they name what is wrong with the fastest one."""
    unlimited = replace(request, max_encoder_units=None, max_llm_microbatches=None, memory=None)
    costs, size = request.action_costs, request.pipeline_parallel_size
    backbone = get_backbone(request.backbone)
    layouts = stage_ranks(backbone, size, request.stages_per_rank, "EF" in costs.kinds, "G" in costs.kinds)

    def make(stage_rank: Sequence[int]) -> Plan:
        return make_plan(replace(unlimited, stage_rank=stage_rank))

    plan = fastest(make, layouts, size, request.microbatches, costs, request.workload)
    verify(plan, request.max_encoder_units, request.max_llm_microbatches, request.workload, request.memory)
    return plan


def _without_actions(request: PlanRequest) -> Plan:
    """All of a plan but its ranks' actions."""
    policy, size, costs = POLICIES[request.policy], request.pipeline_parallel_size, request.action_costs
    stage_rank = request.stage_rank
    if stage_rank is None:
        stage_rank = get_backbone(request.backbone).stage_rank(size, request.stages_per_rank)
    assert request.group_size != "auto"
    group_size = policy.group_size(request.group_size, stage_rank, size)
    groups = request.groups if policy.spread else None
    if groups is None:
        make_groups = ramp_groups if request.ramp and policy.spread else even_groups
        groups = make_groups(request.microbatches, group_size)
    fewer_ranks = len(set(stage_rank)) < size
    plan = Plan(
        policy=request.policy,
        backbone=request.backbone,
        pipeline_parallel_size=size,
        virtual_stages=request.stages_per_rank,
        microbatches=request.microbatches,
        stage_rank=list(stage_rank),
        groups=[list(group) for group in groups],
        encoder_shares=[],
        generator_shares=[],
        ranks=[],
        costs=costs,
        stage_costs=longer_stages(stage_rank, size, costs, request.stage_costs)
        if fewer_ranks
        else [list(row) for row in request.stage_costs or []],
    )
    check_stage_costs(plan)
    check_workload(plan, request.workload)
    if "EF" in costs.kinds:
        ranks = policy.encoder_ranks(stage_rank, size)
        plan.encoder_shares = _shares("encoder_shares", plan, "EF", ranks, request)
    if "G" in costs.kinds:
        ranks = policy.generator_ranks(stage_rank, size)
        plan.generator_shares = _shares("generator_shares", plan, "G", ranks, request)
    return plan


def _with_backbone(plan: Plan, extra_in_flight: int) -> Plan:
    """The plan with the bare backbone's actions."""
    size, ranks, kinds = plan.pipeline_parallel_size, len(set(plan.stage_rank)), plan.costs.kinds
    orders = get_backbone(plan.backbone).build(ranks, plan.microbatches, extra_in_flight, plan.virtual_stages)
    if POLICIES[plan.policy].own_ranks:
        orders = at_stages(orders, plan.stage_rank, size)
    if "B" in kinds and "I" not in kinds and any(action.kind == "I" for actions in orders for action in actions):
        raise ValueError(f"costs.I or costs.W is 0; expected more, as {plan.backbone} splits backwards into I and W")
    return replace(plan, ranks=[[action for action in actions if plan.occurs(action)] for actions in orders])


def _with_generator_hidden(plan: Plan) -> Plan:
    """The bare backbone with so many microbatches in flight that each group's generator work fits between the last
    stage's forwards of the group and its first backward of it."""
    least = max(map(len, plan.groups)) * (2 if POLICIES[plan.policy].own_ranks else 1)
    numbers = range(min(least, plan.microbatches), plan.microbatches + 1)  # M: all forwards first, always enough
    return next(longer for longer in (_with_backbone(plan, number) for number in numbers) if _generator_fits(longer))


def _generator_fits(plan: Plan) -> bool:
    """Whether the last stage forwards every group's microbatches before its first backward of the group."""
    last = plan.stages - 1
    place = {
        (action.kind == "F", action.index): position
        for position, action in enumerate(plan.ranks[plan.stage_rank[last]])
        if action.stage == last and action.kind != "W"
    }
    trained = (False, 0) in place
    return not trained or all(
        max(place[True, microbatch] for microbatch in group) < min(place[False, microbatch] for microbatch in group)
        for group in plan.groups
    )


def _with_best_shares(placed: Plan, bare: Plan, given: PolicyInput) -> Plan:
    """The plan with the fastest of the uneven shares, if one is faster and has no more encoder units alive."""
    policy, best, timeline = POLICIES[bare.policy], placed, simulate(placed, given.workload)
    limit = given.max_encoder_units or max(*timeline.encoder_units, default_limit(bare))
    given = replace(given, max_encoder_units=limit)
    for encoder, generator in uneven_shares(bare):
        uneven = replace(
            bare,
            encoder_shares=encoder if bare.encoder_shares else [],
            generator_shares=generator if bare.generator_shares else [],
        )
        uneven.ranks = policy.place(uneven, given)
        found = simulate(uneven)
        if max(found.encoder_units) <= limit + 1e-9 and found.makespan < timeline.makespan:
            best, timeline = uneven, found
    return best


def _most_encoder_units(bare: Timeline, request: PlanRequest) -> float | None:
    """The most encoder units that fit into the memory beside the LLM's microbatches, or fewer if fewer are allowed."""
    memory, most = request.memory, request.max_encoder_units
    if memory is None or memory.budget is None or not memory.encoder_unit:
        return most
    fits = memory.encoder_units(bare.llm_microbatches)
    return fits if most is None else min(fits, most)


def _shares(name: str, plan: Plan, kind: str, ranks: Sequence[int], request: PlanRequest) -> list[list[float]]:
    """The rows that are given, or rows that spread the work evenly over the ranks that may do it."""
    size, workload = plan.pipeline_parallel_size, request.workload
    given: Sequence[Sequence[float]] | None = getattr(request, name)
    if not ranks:
        raise ValueError(f"stage_rank is {plan.stage_rank}, which leaves no rank for {kind}; expected at least one")
    if given is None:
        even = [1 / len(ranks) if rank in ranks else 0.0 for rank in range(size)]
        idle = [workload is not None and not workload.total(kind, group) for group in plan.groups]
        return [[0.0] * size if nothing else list(even) for nothing in idle]
    rows = [list(row) for row in given]
    for group, row in enumerate(rows):
        if any(share for rank, share in enumerate(row) if rank not in ranks):
            raise ValueError(
                f"{name}: group {group} has the shares {row}; expected all of it on rank "
                f"{' or '.join(map(str, ranks))}, as the policy is {plan.policy!r}"
            )
    return rows


def _nested_time(plan: Plan, request: PlanRequest) -> float:
    """Encoder and generator time of all ranks together, without any recomputation."""
    return sum(
        group_cost(plan, request.workload, kind, group) * sum(share)
        for kind in ("EF", "EB", "G")
        if kind in plan.costs.kinds
        for group, share in zip(plan.groups, plan.shares(kind), strict=True)
    )
