"""Policy `disaggregated`: ranks of their own for the encoder, the LLM's stages and the generator (as DistTrain,
arXiv 2408.04275).

Ranks lie in the order of the data: encoder, stages, generator. The LLM's stages are fewer, and longer by as much.
Knows bare backbones and their times; knows nothing of how a plan is put together (see ``policies``).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones import Backbone, Orders, get_backbone
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.placing.policy_input import PolicyInput
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.schedule.workload import Workload

LEADS = (0, 1, 2)
"""How many groups the encoder ranks may be ahead of what stage 0 cannot do without."""


def stage_ranks(schedule: Backbone, size: int, virtual_stages: int, encoder: bool, generator: bool) -> list[list[int]]:
    """Every way to lay `size` ranks out: the rank of each stage, with at least one rank for whatever there is.

    Raises:
        ValueError: if there are too few ranks.
    """
    parts = ["encoder"] * encoder + ["LLM"] + ["generator"] * generator
    if size < len(parts):
        raise ValueError(
            f"pipeline_parallel_size is {size}; policy disaggregated expects at least {len(parts)}, "
            f"as {', '.join(parts)} have ranks of their own"
        )
    found: list[list[int]] = []
    for before in range(1, size) if encoder else [0]:
        for after in range(1, size - before) if generator else [0]:
            if size - before - after > 0:
                stages = schedule.stage_rank(size - before - after, virtual_stages)
                found.append([before + rank for rank in stages])
    return found


def fastest(
    make: Callable[[Sequence[int]], Plan],
    layouts: Sequence[Sequence[int]],
    size: int,
    microbatches: int,
    costs: Costs,
    workload: Workload | None,
) -> Plan:
    """The plan that takes the least time, of those that `make` gives for the layouts."""
    best: Plan | None = None
    for least, layout in sorted((_least_time(row, size, microbatches, costs, workload), row) for row in layouts):
        if best is not None and least >= best.makespan:
            break
        plan = make(layout)
        if best is None or plan.makespan < best.makespan:
            best = plan
    assert best is not None
    return best


def _least_time(
    stage_rank: Sequence[int], size: int, microbatches: int, costs: Costs, workload: Workload | None
) -> float:
    """No plan with this layout takes less time: the work of the busiest rank, with its wait for the others' stages."""
    kinds = costs.kinds
    forward = workload.total("EF") if workload else microbatches * costs.EF
    encoder = forward * (1 + costs.EB / costs.EF) if "EB" in kinds else forward if "EF" in kinds else 0.0
    generator = (workload.total("G") if workload else microbatches * costs.G) if "G" in kinds else 0.0
    scales = [work.llm for work in workload.microbatches] if workload else [1.0] * microbatches
    backward, passed = (min(costs.B, costs.I + costs.W), min(costs.B, costs.I)) if "I" in kinds else (costs.B, costs.B)
    ranks = len(set(stage_rank))
    virtual_stages = len(stage_rank) // ranks
    llm = sum(scales) * (costs.F + backward) * virtual_stages
    if virtual_stages == 1:
        llm += min(scales) * (costs.F + passed) * (ranks - 1)
    return max(
        encoder / max(1, len(encoder_ranks(stage_rank))),
        llm * size / ranks,
        generator / max(1, len(generator_ranks(stage_rank, size))),
    )


def longer_stages(
    stage_rank: Sequence[int], size: int, costs: Costs, rows: Sequence[Sequence[float]] | None
) -> list[list[float]]:
    """The times of F, B, I and W per stage, where `costs` or `rows` give those of stages on all `size` ranks."""
    ranks = len(set(stage_rank))
    given = rows or [[costs.F, costs.B, costs.I or costs.B, costs.W]] * len(stage_rank)
    return [[time * size / ranks for time in row] for row in given]


def whole_llm(plan: Plan) -> Plan:
    """The bare backbone with its stages on all ranks."""
    size, schedule = plan.pipeline_parallel_size, get_backbone(plan.backbone)
    shorter = len(set(plan.stage_rank)) / size
    mean = [sum(times) / len(plan.stage_costs) * shorter for times in zip(*plan.stage_costs, strict=True)]
    stage_rank = schedule.stage_rank(size, plan.virtual_stages)
    whole = replace(plan, stage_rank=stage_rank, stage_costs=[mean] * len(stage_rank))
    orders = schedule.build(size, plan.microbatches, 0, plan.virtual_stages)
    return replace(whole, ranks=[[action for action in actions if whole.occurs(action)] for actions in orders])


def at_stages(orders: Orders, stage_rank: Sequence[int], size: int) -> Orders:
    """A backbone's orders among the lists of all ranks, of which the others are empty."""
    before, after = len(encoder_ranks(stage_rank)), len(generator_ranks(stage_rank, size))
    return [[] for _ in range(before)] + orders + [[] for _ in range(after)]


def encoder_ranks(stage_rank: Sequence[int]) -> range:
    """The ranks before those of the stages."""
    return range(min(stage_rank))


def generator_ranks(stage_rank: Sequence[int], size: int) -> range:
    """The ranks after those of the stages."""
    return range(max(stage_rank) + 1, size)


def disaggregated(plan: Plan, given: PolicyInput) -> Orders:
    """Encoder ranks run forwards ahead, bounded by what stage 0 has in flight, and backwards as gradients come back;
    generator ranks follow the last stage."""
    stages = range(min(plan.stage_rank), max(plan.stage_rank) + 1)
    generators = generator_ranks(plan.stage_rank, plan.pipeline_parallel_size)
    generated = [Action("G", group) for group in range(len(plan.generator_shares))]
    best: tuple[float, Orders] | None = None
    for lead in LEADS:
        encoded = _encoder_order(plan, lead)
        ranks = [
            plan.ranks[rank]
            if rank in stages
            else [
                action
                for action in (generated if rank in generators else encoded)
                if plan.shares(action.kind)[action.index][rank] > 0
            ]
            for rank in range(plan.pipeline_parallel_size)
        ]
        makespan = simulate(replace(plan, ranks=ranks), given.workload).makespan
        if best is None or makespan < best[0] * (1 - 1e-6):
            best = (makespan, ranks)
    assert best is not None
    return best[1]


def _encoder_order(plan: Plan, lead: int) -> list[Action]:
    """EB of each group as soon as stage 0 can have ended it; before it the EFs that stage 0 needs until then, and
    those of `lead` groups more."""
    groups = range(len(plan.encoder_shares))
    if "EB" not in plan.costs.kinds:
        return [Action("EF", group) for group in groups]
    group_of = {microbatch: g for g, group in enumerate(plan.groups) for microbatch in group}
    left = [len(group) for group in plan.groups]
    order: list[Action] = []
    forwards, needed = 0, 0
    for action in plan.ranks[plan.stage_rank[0]]:
        if action.stage != 0 or action.kind == "W":
            continue
        group = group_of[action.index]
        if action.kind == "F":
            needed = max(needed, group + 1)
            continue
        left[group] -= 1
        if not left[group]:
            ahead = min(needed + lead, len(groups))
            order += [Action("EF", g) for g in range(forwards, ahead)] + [Action("EB", group)]
            forwards = max(forwards, ahead)
    return order
