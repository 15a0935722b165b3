"""Makes plans: builds a backbone, lets a policy place the encoder and generator work around it, and verifies the
result."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.groups import even_groups, ramp_groups
from bigmac_lightning.schedule.placing.disaggregated import at_stages, fastest, longer_stages, stage_ranks, whole_llm
from bigmac_lightning.schedule.placing.filling import default_limit
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.placing.policy_input import PolicyInput
from bigmac_lightning.schedule.placing.uneven_shares import uneven_shares
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import Timeline, check_workload, group_cost, simulate
from bigmac_lightning.schedule.verify import check_header, check_stage_costs, verify


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector inside the block.

    Planning makes many small objects and no reference cycles; searching them for cycles would take half of its time.
    """
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

    Args:
        request: the options, none of which may be "auto" (``choose`` replaces "auto" by values).

    Returns: the verified plan with its makespan, ideal and peaks.

    Raises:
        ValueError: an option is "auto", or its value does not fit the others; the message names the option.
        PlanError: the plan breaks a rule or exceeds a limit; see ``verify``.
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
    policy_input = PolicyInput(bare, workload, _encoder_unit_limit(bare, request), pieces)
    placed = replace(plan, ranks=policy.place(plan, policy_input))
    if policy.uneven_shares and not (request.encoder_shares or request.generator_shares or workload):
        placed = _with_best_shares(placed, plan, policy_input)
    timeline = verify(placed, request.max_encoder_units, request.max_llm_microbatches, workload, request.memory)
    peak = {"encoder_units": timeline.encoder_units, "llm_microbatches": timeline.llm_microbatches}
    return replace(placed, makespan=timeline.makespan, ideal=ideal, peak=peak)


def _on_fastest_ranks(request: PlanRequest) -> Plan:
    """Make the fastest plan of a policy that has separate ranks for encoder, LLM and generator.

    The limits are checked only at the end, so that an error is about the fastest plan.
    """
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
    """Make the plan with everything but its ranks' actions, which are filled in later."""
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
        meeting=list(request.meeting),
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
    """Return the plan with the bare backbone's actions, with this many more microbatches in flight."""
    size, ranks, kinds = plan.pipeline_parallel_size, len(set(plan.stage_rank)), plan.costs.kinds
    orders = get_backbone(plan.backbone).build(ranks, plan.microbatches, extra_in_flight, plan.virtual_stages)
    if POLICIES[plan.policy].own_ranks:
        orders = at_stages(orders, plan.stage_rank, size)
    if "B" in kinds and "I" not in kinds and any(action.kind == "I" for actions in orders for action in actions):
        raise ValueError(
            f"costs.I or costs.W is 0; expected times above 0, as {plan.backbone} splits backwards into I and W"
        )
    return replace(plan, ranks=[[action for action in actions if plan.occurs(action)] for actions in orders])


def _with_generator_hidden(plan: Plan) -> Plan:
    """Return the plan with the bare backbone's actions, with the fewest extra microbatches in flight that let each
    group's generator work run between the last stage's forwards of the group and its first backward of it.

    With separate ranks twice the group size is needed: the generator's ranks work on one group while the last stage
    forwards the next one.
    """
    least = max(map(len, plan.groups)) * (2 if POLICIES[plan.policy].own_ranks else 1)
    numbers = range(min(least, plan.microbatches), plan.microbatches + 1)  # with M, all forwards come first: it fits
    return next(longer for longer in (_with_backbone(plan, number) for number in numbers) if _generator_fits(longer))


def _generator_fits(plan: Plan) -> bool:
    """Whether the last stage forwards every group's microbatches before its first backward of the group."""
    last = plan.stages - 1
    position_of = {
        (action.kind == "F", action.index): position
        for position, action in enumerate(plan.ranks[plan.stage_rank[last]])
        if action.stage == last and action.kind != "W"
    }
    trained = (False, 0) in position_of
    return not trained or all(
        max(position_of[True, m] for m in group) < min(position_of[False, m] for m in group) for group in plan.groups
    )


def _with_best_shares(placed: Plan, bare: Plan, policy_input: PolicyInput) -> Plan:
    """Return the plan with the fastest of several uneven shares, or `placed` if none of them is faster within the limit
    on encoder units.

    Args:
        placed: the plan with even shares and all its actions.
        bare: the same plan with only the bare backbone's actions.
        policy_input: the input of the policy that made `placed`.
    """
    policy, best, timeline = POLICIES[bare.policy], placed, simulate(placed, policy_input.workload)
    limit = policy_input.max_encoder_units or max(*timeline.encoder_units, default_limit(bare))
    policy_input = replace(policy_input, max_encoder_units=limit)
    for encoder, generator in uneven_shares(bare):
        uneven = replace(
            bare,
            encoder_shares=encoder if bare.encoder_shares else [],
            generator_shares=generator if bare.generator_shares else [],
        )
        uneven.ranks = policy.place(uneven, policy_input)
        found = simulate(uneven)
        if max(found.encoder_units) <= limit + 1e-9 and found.makespan < timeline.makespan:
            best, timeline = uneven, found
    return best


def _encoder_unit_limit(bare: Timeline, request: PlanRequest) -> float | None:
    """The limit on live encoder units: the requested one, or what the memory budget leaves room for if that is less.
    ``None`` if neither is given."""
    memory, limit = request.memory, request.max_encoder_units
    if memory is None or memory.budget is None or not memory.encoder_unit:
        return limit
    fits = memory.encoder_units(bare.llm_microbatches)
    return fits if limit is None else min(fits, limit)


def _shares(name: str, plan: Plan, kind: str, ranks: Sequence[int], request: PlanRequest) -> list[list[float]]:
    """Return the requested shares (per group, one per rank), or shares that spread the work evenly over `ranks`.

    Raises:
        ValueError: `ranks` is empty, or the requested shares give work to other ranks.
    """
    size, workload = plan.pipeline_parallel_size, request.workload
    requested: Sequence[Sequence[float]] | None = getattr(request, name)
    if not ranks:
        raise ValueError(f"stage_rank is {plan.stage_rank}, which leaves no rank for {kind}; expected at least one")
    if requested is None:
        even = [1 / len(ranks) if rank in ranks else 0.0 for rank in range(size)]
        without_work = [workload is not None and not workload.total(kind, group) for group in plan.groups]
        return [[0.0] * size if nothing else list(even) for nothing in without_work]
    rows = [list(row) for row in requested]
    for group, row in enumerate(rows):
        if any(share for rank, share in enumerate(row) if rank not in ranks):
            raise ValueError(
                f"{name}: group {group} has the shares {row}; expected all of it on rank "
                f"{' or '.join(map(str, ranks))}, as the policy is {plan.policy!r}"
            )
    return rows


def _nested_time(plan: Plan, request: PlanRequest) -> float:
    """The sum over all ranks of their encoder and generator time, not counting recomputation."""
    return sum(
        group_cost(plan, request.workload, kind, group) * sum(share)
        for kind in ("EF", "EB", "G")
        if kind in plan.costs.kinds
        for group, share in zip(plan.groups, plan.shares(kind), strict=True)
    )
