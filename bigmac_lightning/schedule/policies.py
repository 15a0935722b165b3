"""Makes plans: how encoder and generator work is placed around a backbone.

Knows backbones, the nesting pass and costs; knows nothing of files, processes or models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones import Orders, get_backbone
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.disaggregated import (
    at_stages,
    disaggregated,
    encoder_ranks,
    fastest,
    generator_ranks,
    longer_stages,
    stage_ranks,
    whole_llm,
)
from bigmac_lightning.schedule.filling import fill
from bigmac_lightning.schedule.nesting import nest
from bigmac_lightning.schedule.plan import Plan, even_groups
from bigmac_lightning.schedule.simulate import Timeline, check_workload, group_cost, simulate
from bigmac_lightning.schedule.verify import check_header, check_stage_costs, verify
from bigmac_lightning.schedule.workload import Workload


@dataclass(frozen=True)
class Policy:
    """How encoder and generator work is placed.

    Attributes:
        place: from a plan whose lists hold the bare backbone, its timeline, the workload and the most encoder units
            that may be alive, all ranks' actions. Most policies leave that limit to ``verify``.
        spread: whether groups' work is spread over the ranks; if not, groups are single microbatches, encoded on the
            rank of stage 0 and generated on that of the last stage.
        own_ranks: whether encoder and generator work has ranks of its own, which hold no stage.
    """

    place: Callable[[Plan, Timeline, Workload | None, float | None], Orders]
    spread: bool = True
    own_ranks: bool = False

    def group_size(self, given: int | None, stage_rank: Sequence[int], size: int) -> int:
        """Microbatches per group: as given, or one for each rank that may have some of the work."""
        if not self.spread:
            return 1
        ranks = max(len(self.encoder_ranks(stage_rank, size)), len(self.generator_ranks(stage_rank, size)), 1)
        return ranks if given is None else given

    def encoder_ranks(self, stage_rank: Sequence[int], size: int) -> Sequence[int]:
        """The ranks, of `size`, that may have encoder work."""
        if self.own_ranks:
            return encoder_ranks(stage_rank)
        return range(size) if self.spread else stage_rank[:1]

    def generator_ranks(self, stage_rank: Sequence[int], size: int) -> Sequence[int]:
        """The ranks, of `size`, that may have generator work."""
        if self.own_ranks:
            return generator_ranks(stage_rank, size)
        return range(size) if self.spread else stage_rank[-1:]


def nested(plan: Plan, bare: Timeline, workload: Workload | None = None, limit: float | None = None) -> Orders:
    """BigMac (arXiv 2605.25451): every group's work in the pause of a consistent cut."""
    del limit
    return nest(plan, bare, ("EF", "EB", "G"), workload)


def upfront(plan: Plan, bare: Timeline, workload: Workload | None = None, limit: float | None = None) -> Orders:
    """All encoder forwards first, all encoder backwards last; the generator nested just the same.

    Also the places of `recompute`, whose encoder backwards do the forward once more (Kimi K2.5 style)."""
    del limit

    def work(kind: str, rank: int) -> list[Action]:
        return [
            Action("EF" if kind == "EF" else "EB", group)
            for group, row in enumerate(plan.encoder_shares if kind in plan.costs.kinds else [])
            if row[rank] > 0
        ]

    inner = nest(plan, bare, ("G",), workload)
    return [work("EF", rank) + actions + work("EB", rank) for rank, actions in enumerate(inner)]


def first_stage(plan: Plan, bare: Timeline, workload: Workload | None = None, limit: float | None = None) -> Orders:
    """The encoder inside stage 0 and the generator inside the last stage, microbatch by microbatch (Megatron style)."""
    del bare, workload, limit
    first, last, kinds = plan.stage_rank[0], plan.stage_rank[-1], plan.costs.kinds
    group_of = {group[0]: g for g, group in enumerate(plan.groups)}
    ranks: Orders = []
    for actions in plan.ranks:
        merged: list[Action] = []
        for action in actions:
            group, backward = group_of[action.index], action.kind in ("B", "I")
            if action.stage == 0 and action.kind == "F" and _share(plan.encoder_shares, group, first):
                merged.append(Action("EF", group))
            merged.append(action)
            if action.stage == plan.stages - 1 and action.kind == "F" and _share(plan.generator_shares, group, last):
                merged.append(Action("G", group))
            if action.stage == 0 and backward and "EB" in kinds and _share(plan.encoder_shares, group, first):
                merged.append(Action("EB", group))
        ranks.append(merged)
    return ranks


def filled(plan: Plan, bare: Timeline, workload: Workload | None = None, limit: float | None = None) -> Orders:
    """As `nested`, and then moved into the backbone's bubbles; never longer than `nested`."""
    return fill(plan, bare, workload, limit)


POLICIES: dict[str, Policy] = {
    "nested": Policy(nested),
    "upfront": Policy(upfront),
    "first_stage": Policy(first_stage, spread=False),
    "filled": Policy(filled),
    "recompute": Policy(upfront),
    "disaggregated": Policy(disaggregated, own_ranks=True),
}


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
    workload: Workload | None = None,
    max_encoder_units: float | None = None,
    stage_costs: Sequence[Sequence[float]] | None = None,
    stage_rank: Sequence[int] | None = None,
) -> Plan:
    """Make a plan and verify it.

    Args:
        policy: a name in ``POLICIES``.
        backbone: a name in ``BACKBONES``.
        pipeline_parallel_size: number of ranks, P.
        microbatches: number of microbatches, M.
        group_size: microbatches per group, the last one may have fewer; by default as many as the ranks that share
            the encoder's or the generator's work, mostly P. `first_stage` always takes 1.
        costs: times of the actions; ``Costs()`` by default.
        virtual_stages: stages per rank.
        encoder_shares: per group, each rank's fraction of its encoder work, a row of zeros for a group without any;
            by default the same for all ranks that may have some (for `first_stage`: the rank of stage 0).
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

    Raises:
        ValueError: names the argument, its value and what is expected.
        PlanError: if the plan breaks a rule; see ``verify``.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; expected one of {', '.join(POLICIES)}")
    chosen, schedule, costs = POLICIES[policy], get_backbone(backbone), costs or Costs()
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
        verify(plan, max_encoder_units, workload=workload)
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
        groups=even_groups(microbatches, group_size),
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
        least = group_size * (2 if chosen.own_ranks else 1)  # so that a group's generator work hides behind the next
        wanted = range(min(least, microbatches), microbatches + 1)  # all forwards first: always enough
        plan.ranks = next(ranks for ranks in map(bare_backbone, wanted) if _generator_fits(plan, ranks))
        bare = simulate(plan, workload)
    elif extra_in_flight:
        plan.ranks = bare_backbone(extra_in_flight)
        bare = simulate(plan, workload)
    plan.ranks = chosen.place(plan, bare, workload, max_encoder_units)
    timeline = verify(plan, max_encoder_units, workload=workload)
    plan.makespan = timeline.makespan
    plan.ideal += _nested_time(plan, workload) / size
    plan.peak = {"encoder_units": timeline.encoder_units, "llm_microbatches": timeline.llm_microbatches}
    return plan


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


def _share(rows: list[list[float]], group: int, rank: int) -> float:
    return rows[group][rank] if rows else 0.0


def _nested_time(plan: Plan, workload: Workload | None) -> float:
    """Encoder and generator time of all ranks together, without any recomputation."""
    return sum(
        group_cost(plan, workload, kind, group) * sum(share)
        for kind in ("EF", "EB", "G")
        if kind in plan.costs.kinds
        for group, share in zip(plan.groups, plan.shares(kind), strict=True)
    )
