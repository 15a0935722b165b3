"""Policy `disaggregated`: the encoder, the LLM and the generator have separate ranks (as in DistTrain, arXiv
2408.04275).

Ranks are numbered in the order of the data: first those of the encoder, then those of the LLM's stages, then those of
the generator. As fewer than P ranks have stages, each stage takes proportionally longer.
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
"""Numbers of groups that the encoder ranks encode earlier than stage 0 needs them; each is tried, the fastest is taken.

Each group ahead takes memory on the encoder's ranks. In 60 settings (P = 2, 4, 8; M = 3P; 1f1b and zb1p; latency 0.1)
only 0 made plans up to 1.52 times as long, and (0, 1) up to 1.07 times; values up to 6 made 12 of them up to 8%
shorter.
"""


def stage_ranks(schedule: Backbone, size: int, virtual_stages: int, encoder: bool, generator: bool) -> list[list[int]]:
    """Return every way to divide `size` ranks among encoder, LLM and generator, each as the list of every stage's rank.

    Each part that exists gets at least one rank.

    Args:
        schedule: the backbone.
        size: number of ranks.
        virtual_stages: stages per rank of the LLM.
        encoder: whether there is an encoder.
        generator: whether there is a generator.

    Raises:
        ValueError: there are fewer ranks than parts.
    """
    parts = ["encoder"] * encoder + ["LLM"] + ["generator"] * generator
    if size < len(parts):
        raise ValueError(
            f"pipeline_parallel_size is {size}; policy disaggregated expects at least {len(parts)}, "
            f"as {', '.join(parts)} have separate ranks"
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
    """Return the plan with the shortest makespan over all layouts.

    The layouts are tried in the order of a lower bound on their makespan, so that most of them need no plan.

    Args:
        make: makes the plan of a layout (the rank of each stage).
        layouts: the layouts to try, see ``stage_ranks``.
        size: number of ranks.
        microbatches: number of microbatches.
        costs: times of the actions, for stages on all ranks.
        workload: the work of each microbatch, where they differ.
    """
    best: Plan | None = None
    for bound, layout in sorted((_least_time(row, size, microbatches, costs, workload), row) for row in layouts):
        if best is not None and bound >= best.makespan:
            break
        plan = make(layout)
        if best is None or plan.makespan < best.makespan:
            best = plan
    assert best is not None
    return best


def _least_time(
    stage_rank: Sequence[int], size: int, microbatches: int, costs: Costs, workload: Workload | None
) -> float:
    """Return a lower bound on the makespan of a layout: the time of the busiest rank's work.

    For the LLM's ranks, with one stage each, this includes the time for which one of them waits while the shortest
    microbatch passes the other stages forward and backward.
    """
    kinds = costs.kinds
    forward = workload.total("EF") if workload else microbatches * costs.EF
    encoder = forward * (1 + costs.EB / costs.EF) if "EB" in kinds else forward if "EF" in kinds else 0.0
    generator = (workload.total("G") if workload else microbatches * costs.G) if "G" in kinds else 0.0
    scales = [microbatch.llm for microbatch in workload.microbatches] if workload else [1.0] * microbatches
    backward = min(costs.B, costs.I + costs.W) if "I" in kinds else costs.B
    input_backward = min(costs.B, costs.I) if "I" in kinds else costs.B
    ranks = len(set(stage_rank))
    virtual_stages = len(stage_rank) // ranks
    llm = sum(scales) * (costs.F + backward) * virtual_stages
    if virtual_stages == 1:
        llm += min(scales) * (costs.F + input_backward) * (ranks - 1)
    return max(
        encoder / max(1, len(encoder_ranks(stage_rank))),
        llm * size / ranks,
        generator / max(1, len(generator_ranks(stage_rank, size))),
    )


def longer_stages(
    stage_rank: Sequence[int], size: int, costs: Costs, stage_costs: Sequence[Sequence[float]] | None
) -> list[list[float]]:
    """Return the times of F, B, I and W of each stage of a layout.

    Args:
        stage_rank: rank of each stage.
        size: number of all ranks.
        costs: times of one stage if the stages were on all ranks.
        stage_costs: per stage, its own times in the same sense, which take the place of `costs`.
    """
    ranks = len(set(stage_rank))
    rows = stage_costs or [[costs.F, costs.B, costs.I or costs.B, costs.W]] * len(stage_rank)
    return [[time * size / ranks for time in row] for row in rows]


def whole_llm(plan: Plan) -> Plan:
    """Return the plan's bare backbone with stages on all ranks, which gives the ideal that plans are compared with."""
    size, schedule = plan.pipeline_parallel_size, get_backbone(plan.backbone)
    shorter = len(set(plan.stage_rank)) / size
    mean = [sum(times) / len(plan.stage_costs) * shorter for times in zip(*plan.stage_costs, strict=True)]
    stage_rank = schedule.stage_rank(size, plan.virtual_stages)
    whole = replace(plan, stage_rank=stage_rank, stage_costs=[mean] * len(stage_rank))
    orders = schedule.build(size, plan.microbatches, 0, plan.virtual_stages)
    return replace(whole, ranks=[[action for action in actions if whole.occurs(action)] for actions in orders])


def at_stages(orders: Orders, stage_rank: Sequence[int], size: int) -> Orders:
    """Return the lists of all ranks: the backbone's orders on the LLM's ranks, and empty lists on the others."""
    before, after = len(encoder_ranks(stage_rank)), len(generator_ranks(stage_rank, size))
    return [[] for _ in range(before)] + orders + [[] for _ in range(after)]


def encoder_ranks(stage_rank: Sequence[int]) -> range:
    """Return the encoder's ranks, which are lower than those of the stages."""
    return range(min(stage_rank))


def generator_ranks(stage_rank: Sequence[int], size: int) -> range:
    """Return the generator's ranks, which are higher than those of the stages."""
    return range(max(stage_rank) + 1, size)


def disaggregated(plan: Plan, policy_input: PolicyInput) -> Orders:
    """Return all ranks' actions, for the fastest of ``LEADS``.

    The encoder's ranks encode a limited number of groups ahead and run each backward when its gradients arrive. The
    generator's ranks work on the groups in order.
    """
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
        makespan = simulate(replace(plan, ranks=ranks), policy_input.workload).makespan
        if best is None or makespan < best[0] * (1 - 1e-6):  # a rounding error must not decide for a larger lead
            best = (makespan, ranks)
    assert best is not None
    return best[1]


def _encoder_order(plan: Plan, lead: int) -> list[Action]:
    """Return the order of the encoder's actions: the EBs in the order in which stage 0 ends the groups. Before each EB
    stand the EFs of all groups that stage 0 begins before it ends this one, and of `lead` groups more.

    Fewer EFs would be a deadlock, as stage 0 would wait for features behind an EB that waits for stage 0.
    """
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
