"""The policies, by name: how encoder and generator work is placed around a bare backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones import Orders
from bigmac_lightning.schedule.placing.disaggregated import disaggregated, encoder_ranks, generator_ranks
from bigmac_lightning.schedule.placing.filling import fill
from bigmac_lightning.schedule.placing.nesting import nest
from bigmac_lightning.schedule.placing.policy_input import PolicyInput
from bigmac_lightning.schedule.plan import Plan


@dataclass(frozen=True)
class Policy:
    """How encoder and generator work is placed.

    Attributes:
        place: gives all ranks' actions, from a plan whose lists hold the bare backbone.
        spread: whether groups' work is spread over the ranks; if not, groups are single microbatches, encoded on the
            rank of stage 0 and generated on that of the last stage.
        uneven_shares: whether ranks may be given unequal shares of the work where stages differ.
        own_ranks: whether encoder and generator work has ranks of its own, which hold no stage.
    """

    place: Callable[[Plan, PolicyInput], Orders]
    spread: bool = True
    uneven_shares: bool = False
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


def nested(plan: Plan, given: PolicyInput) -> Orders:
    """BigMac (arXiv 2605.25451): every group's work in the pause of a consistent cut."""
    return nest(plan, given.bare, workload=given.workload)


def upfront(plan: Plan, given: PolicyInput) -> Orders:
    """All encoder forwards first, all encoder backwards last; the generator nested just the same.

    Also the places of `recompute`, whose encoder backwards do the forward once more (Kimi K2.5 style)."""

    def work(kind: str, rank: int) -> list[Action]:
        return [
            Action("EF" if kind == "EF" else "EB", group)
            for group, row in enumerate(plan.encoder_shares if kind in plan.costs.kinds else [])
            if row[rank] > 0
        ]

    inner = nest(plan, given.bare, ("G",), given.workload)
    return [work("EF", rank) + actions + work("EB", rank) for rank, actions in enumerate(inner)]


def first_stage(plan: Plan, given: PolicyInput) -> Orders:
    """The encoder inside stage 0 and the generator inside the last stage, microbatch by microbatch (Megatron style)."""
    del given
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


def filled(plan: Plan, given: PolicyInput) -> Orders:
    """As `nested`, and then moved into the backbone's bubbles; never longer than `nested`."""
    return fill(plan, given)


POLICIES: dict[str, Policy] = {
    "nested": Policy(nested),
    "upfront": Policy(upfront),
    "first_stage": Policy(first_stage, spread=False),
    "filled": Policy(filled, uneven_shares=True),
    "recompute": Policy(upfront),
    "disaggregated": Policy(disaggregated, own_ranks=True),
}


def get_policy(name: str) -> Policy:
    """The policy of that name; ``ValueError`` lists the names if there is none."""
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}; expected one of {', '.join(POLICIES)}")
    return POLICIES[name]


def _share(rows: list[list[float]], group: int, rank: int) -> float:
    return rows[group][rank] if rows else 0.0
