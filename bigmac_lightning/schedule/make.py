"""Makes plans: a backbone, with encoder and generator work placed around it by a policy.

Knows backbones, policies and costs; knows nothing of files, processes or models.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from bigmac_lightning.schedule.backbones import Orders, get_backbone
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.placing.disaggregated import at_stages, fastest, longer_stages, stage_ranks, whole_llm
from bigmac_lightning.schedule.placing.filling import default_limit
from bigmac_lightning.schedule.placing.policies import POLICIES, Policy
from bigmac_lightning.schedule.placing.setting import Setting
from bigmac_lightning.schedule.placing.uneven_shares import shares_to_try
from bigmac_lightning.schedule.plan import Plan, even_groups
from bigmac_lightning.schedule.simulate import Timeline, check_workload, group_cost, simulate
from bigmac_lightning.schedule.verify import check_header, check_stage_costs, verify
from bigmac_lightning.schedule.workload import Workload


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


def get_policy(name: str) -> Policy:
    """The policy of that name; ``ValueError`` lists the names if there is none."""
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}; expected one of {', '.join(POLICIES)}")
    return POLICIES[name]


@_collector_paused()
def make_plan(
    *,
    policy: str = "nested",
    backbone: str = "1f1b",
    pipeline_parallel_size: int,
    microbatches: int,
    group_size: int | None = None,
    costs: Costs | None = None,
    virtual_stages: int = 1,
    encoder_shares: Sequence[Sequence[float]] | None = None,
    generator_shares: Sequence[Sequence[float]] | None = None,
    extra_in_flight: int | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    pieces: int | Sequence[Sequence[int]] = 1,
    workload: Workload | None = None,
    max_encoder_units: float | None = None,
    stage_costs: Sequence[Sequence[float]] | None = None,
    stage_rank: Sequence[int] | None = None,
    max_llm_microbatches: float | None = None,
    memory: MemoryBudget | None = None,
) -> Plan:
    """Make a plan and verify it.

    Args:
        policy: a name in ``POLICIES``.
        backbone: a name in ``BACKBONES``.
        pipeline_parallel_size: number of ranks, P.
        microbatches: number of microbatches, M.
        group_size: microbatches per group, the last one may have fewer; by default as many as the ranks that share
            the encoder's or the generator's work, mostly P. `first_stage` always takes 1.
        groups: the microbatches of each group, if not even ones; see ``ramp_groups``.
        pieces: in how many pieces `filled` may cut an encoder share, so that it fits into smaller bubbles; one number
            for all, or one per group and rank.
        costs: times of the actions; ``Costs()`` by default.
        virtual_stages: stages per rank.
        encoder_shares: per group, each rank's fraction of its encoder work, a row of zeros for a group without any;
            by default the same for all ranks that may have some (for `first_stage`: the rank of stage 0; for
            `filled`, where stages differ: whatever is fastest).
        generator_shares: the same for the generator (`first_stage`: the rank of the last stage).
        extra_in_flight: microbatches in flight beyond those of the backbone; by default as many as a group has if
            there is a generator whose work is spread (more where the backbone needs it; for `disaggregated` twice as
            many), and none otherwise.
        workload: the work of each microbatch, where they differ.
        max_encoder_units: most encoder units that a rank may have alive. `filled` makes use of what is allowed, by
            default 2, or 3 with a generator, or what `nested` takes if that is more.
        stage_costs: per stage, its times of F, B, I and W, where stages differ; see ``Plan.stage_costs``.
        stage_rank: for `disaggregated`, the rank of each stage; ranks before them are the encoder's, ranks after them
            the generator's. By default the numbers of ranks that take the least time. `costs` and `stage_costs` are
            those of stages on all ranks; fewer stages take longer by as much.
        max_llm_microbatches: most LLM microbatches that a rank may have in flight.
        memory: most bytes that a rank may use; `filled` has as many encoder units alive as it allows.

    Raises:
        ValueError: names the argument, its value and what is expected.
        PlanError: if the plan breaks a rule; see ``verify``.
    """
    chosen, schedule, costs = get_policy(policy), get_backbone(backbone), costs or Costs()
    kinds = costs.kinds
    size = pipeline_parallel_size
    _at_least(1, pipeline_parallel_size=size, microbatches=microbatches, virtual_stages=virtual_stages)
    _at_least(1, group_size=1 if group_size is None else group_size)
    _at_least(0, extra_in_flight=extra_in_flight or 0)
    if not chosen.own_ranks:
        if stage_rank is not None:
            raise ValueError(f"stage_rank is given; expected only with policy disaggregated, not with {policy}")
        stage_rank = schedule.stage_rank(size, virtual_stages)
    elif stage_rank is None:
        if stage_costs or encoder_shares or generator_shares:
            raise ValueError(f"stage_rank is missing; policy {policy} expects it beside given shares or stage_costs")

        def laid_out(stage_rank: Sequence[int]) -> Plan:
            return make_plan(
                policy=policy,
                backbone=backbone,
                pipeline_parallel_size=size,
                microbatches=microbatches,
                group_size=group_size,
                costs=costs,
                virtual_stages=virtual_stages,
                extra_in_flight=extra_in_flight,
                workload=workload,
                stage_rank=stage_rank,
            )

        layouts = stage_ranks(schedule, size, virtual_stages, "EF" in kinds, "G" in kinds)
        plan = fastest(laid_out, layouts, size, microbatches, costs, workload)
        verify(plan, max_encoder_units, max_llm_microbatches, workload, memory)
        return plan
    stage_rank = list(stage_rank)
    llm_ranks = len(set(stage_rank))
    group_size = chosen.group_size(group_size, stage_rank, size)

    def bare_backbone(extra: int) -> Orders:
        orders = schedule.build(llm_ranks, microbatches, extra, virtual_stages)
        if chosen.own_ranks:
            orders = at_stages(orders, stage_rank, size)
        if "B" in kinds and "I" not in kinds and any(action.kind == "I" for actions in orders for action in actions):
            raise ValueError(f"costs.I or costs.W is 0; expected more, as {backbone} splits backwards into I and W")
        return [[action for action in actions if plan.occurs(action)] for actions in orders]

    plan = Plan(
        policy=policy,
        backbone=backbone,
        pipeline_parallel_size=size,
        virtual_stages=virtual_stages,
        microbatches=microbatches,
        stage_rank=stage_rank,
        groups=[list(group) for group in groups] if groups and chosen.spread else even_groups(microbatches, group_size),
        encoder_shares=[],
        generator_shares=[],
        ranks=[],
        costs=costs,
        stage_costs=longer_stages(stage_rank, size, costs, stage_costs)
        if llm_ranks < size
        else [list(row) for row in stage_costs or []],
    )
    check_stage_costs(plan)
    plan.ranks = bare_backbone(0)
    check_workload(plan, workload)
    if "EF" in kinds:
        ranks = chosen.encoder_ranks(stage_rank, size)
        plan.encoder_shares = _shares("encoder_shares", plan, "EF", encoder_shares, ranks, workload)
    if "G" in kinds:
        ranks = chosen.generator_ranks(stage_rank, size)
        plan.generator_shares = _shares("generator_shares", plan, "G", generator_shares, ranks, workload)
    check_header(plan)

    bare = simulate(plan, workload)
    plan.ideal = bare.makespan if llm_ranks == size else simulate(whole_llm(plan), workload).makespan
    if extra_in_flight is None and chosen.spread and "G" in kinds:
        least = max(map(len, plan.groups)) * (2 if chosen.own_ranks else 1)  # so that a group's generator work hides
        wanted = range(min(least, microbatches), microbatches + 1)  # all forwards first: always enough
        plan.ranks = next(ranks for ranks in map(bare_backbone, wanted) if _generator_fits(plan, ranks))
        bare = simulate(plan, workload)
    elif extra_in_flight:
        plan.ranks = bare_backbone(extra_in_flight)
        bare = simulate(plan, workload)
    fits = _most_encoder_units(bare, max_encoder_units, memory)
    setting = Setting(bare, workload, fits, pieces)
    free = chosen.pours and encoder_shares is None and generator_shares is None and workload is None
    plan = _placed(plan, setting, chosen, free)
    timeline = verify(plan, max_encoder_units, max_llm_microbatches, workload, memory)
    plan.makespan = timeline.makespan
    plan.ideal += _nested_time(plan, workload) / size
    plan.peak = {"encoder_units": timeline.encoder_units, "llm_microbatches": timeline.llm_microbatches}
    return plan


def _placed(plan: Plan, setting: Setting, policy: Policy, free: bool) -> Plan:
    """The bare plan with its nested work placed; if its shares are `free`, the fastest ones tried."""
    best = replace(plan, ranks=policy.place(plan, setting))
    if free:
        timeline = simulate(best, setting.workload)
        limit = setting.max_encoder_units or max(*timeline.encoder_units, default_limit(plan))
        setting = replace(setting, max_encoder_units=limit)
        for encoder, generator in shares_to_try(plan):
            poured = replace(
                plan,
                encoder_shares=encoder if plan.encoder_shares else [],
                generator_shares=generator if plan.generator_shares else [],
            )
            poured.ranks = policy.place(poured, setting)
            found = simulate(poured)
            if max(found.encoder_units) <= limit + 1e-9 and found.makespan < timeline.makespan:
                best, timeline = poured, found
    return best


def _most_encoder_units(bare: Timeline, most: float | None, memory: MemoryBudget | None) -> float | None:
    """The limit on encoder units that the memory left by the LLM gives, or a lower one that is given."""
    if memory is None or memory.budget is None or not memory.encoder_unit:
        return most
    fits = memory.encoder_units(bare.llm_microbatches)
    return fits if most is None else min(fits, most)


def _generator_fits(plan: Plan, ranks: Orders) -> bool:
    """Whether the last stage forwards every group's microbatches before its first backward of the group."""
    last = plan.stages - 1
    place = {
        (action.kind == "F", action.index): position
        for position, action in enumerate(ranks[plan.stage_rank[last]])
        if action.stage == last and action.kind != "W"
    }
    trained = (False, 0) in place
    return not trained or all(
        max(place[True, microbatch] for microbatch in group) < min(place[False, microbatch] for microbatch in group)
        for group in plan.groups
    )


def _at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name} is {value}; expected an integer of at least {least}")


def _shares(
    name: str,
    plan: Plan,
    kind: str,
    given: Sequence[Sequence[float]] | None,
    ranks: Sequence[int],
    workload: Workload | None,
) -> list[list[float]]:
    """The given rows, or rows that spread the work evenly over the ranks that may do it."""
    size = plan.pipeline_parallel_size
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


def _nested_time(plan: Plan, workload: Workload | None) -> float:
    """Encoder and generator time of all ranks together, without any recomputation."""
    return sum(
        group_cost(plan, workload, kind, group) * sum(share)
        for kind in ("EF", "EB", "G")
        if kind in plan.costs.kinds
        for group, share in zip(plan.groups, plan.shares(kind), strict=True)
    )
