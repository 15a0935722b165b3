"""The policies by name. A policy places encoder and generator work around a bare backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones import Orders
from bigmac_lightning.schedule.placing.disaggregated import disaggregated, encoder_ranks, generator_ranks
from bigmac_lightning.schedule.placing.filling import fill
from bigmac_lightning.schedule.placing.nesting import nest
from bigmac_lightning.schedule.placing.policy_input import PolicyInput
from bigmac_lightning.schedule.plan import Plan, PlanError
from bigmac_lightning.schedule.simulate import simulate


@dataclass(frozen=True)
class Policy:
    """A way to place encoder and generator work.

    Attributes:
        place: function that returns all ranks' actions, for a plan whose lists have only the bare backbone's actions.
        spread: whether a group's work is spread over the ranks. If not, each group is one microbatch, the rank of stage
            0 does the encoder work, and the rank of the last stage does the generator work.
        uneven_shares: whether ranks may get uneven shares of the work by default if stages differ.
        own_ranks: whether encoder and generator work is on separate ranks, which have no LLM stage.
    """

    place: Callable[[Plan, PolicyInput], Orders]
    spread: bool = True
    uneven_shares: bool = False
    own_ranks: bool = False

    def group_size(self, requested: int | None, stage_rank: Sequence[int], size: int) -> int:
        """Return the number of microbatches per group: the requested one, or the number of ranks that share the
        work."""
        if not self.spread:
            return 1
        ranks = max(len(self.encoder_ranks(stage_rank, size)), len(self.generator_ranks(stage_rank, size)), 1)
        return ranks if requested is None else requested

    def encoder_ranks(self, stage_rank: Sequence[int], size: int) -> Sequence[int]:
        """Return the ranks that may have encoder work; `size` is the number of all ranks."""
        if self.own_ranks:
            return encoder_ranks(stage_rank)
        return range(size) if self.spread else stage_rank[:1]

    def generator_ranks(self, stage_rank: Sequence[int], size: int) -> Sequence[int]:
        """Return the ranks that may have generator work; `size` is the number of all ranks."""
        if self.own_ranks:
            return generator_ranks(stage_rank, size)
        return range(size) if self.spread else stage_rank[-1:]


def nested(plan: Plan, policy_input: PolicyInput) -> Orders:
    """Place every group's work in the pause of a consistent cut, as BigMac does (arXiv 2605.25451)."""
    return nest(plan, policy_input.bare, workload=policy_input.workload)


def upfront(plan: Plan, policy_input: PolicyInput) -> Orders:
    """Place all encoder forwards first and all encoder backwards last (as Optimus and LoongForge do); the generator's
    work is placed as by `nested`.

    `recompute` has the same order; there each encoder backward runs the forward again first (as Kimi K2.5 does)."""

    def encoder_actions(kind: str, rank: int) -> list[Action]:
        return [
            Action("EF" if kind == "EF" else "EB", group)
            for group, row in enumerate(plan.encoder_shares if kind in plan.costs.kinds else [])
            if row[rank] > 0
        ]

    inner = nest(plan, policy_input.bare, ("G",), policy_input.workload)
    return [encoder_actions("EF", rank) + actions + encoder_actions("EB", rank) for rank, actions in enumerate(inner)]


def first_stage(plan: Plan, policy_input: PolicyInput) -> Orders:
    """Place the encoder with stage 0 and the generator with the last stage, microbatch by microbatch (as Megatron
    does)."""
    del policy_input
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


def filled(plan: Plan, policy_input: PolicyInput) -> Orders:
    """Start from the plan of `nested` and move the work into the backbone's bubbles; the plan is never longer."""
    if not plan.meeting:
        return fill(plan, policy_input)
    cut = nested(plan, policy_input)
    if all(action.kind in plan.meeting for actions in cut for action in actions if action.nested):
        return cut  # moving one rank's action alone makes the others wait
    # The search does not know that ranks wait for each other, so what it finds may be longer, or a deadlock.
    found = fill(replace(plan, meeting=[]), policy_input)
    return min(cut, found, key=lambda ranks: _makespan(plan, ranks, policy_input))


POLICIES: dict[str, Policy] = {
    "nested": Policy(nested),
    "upfront": Policy(upfront),
    "first_stage": Policy(first_stage, spread=False),
    "filled": Policy(filled, uneven_shares=True),
    "recompute": Policy(upfront),
    "disaggregated": Policy(disaggregated, own_ranks=True),
}


def get_policy(name: str) -> Policy:
    """Return the policy with this name.

    Raises:
        ValueError: there is no such policy; the message lists the names.
    """
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}; expected one of {', '.join(POLICIES)}")
    return POLICIES[name]


def _makespan(plan: Plan, ranks: Orders, policy_input: PolicyInput) -> float:
    try:
        return simulate(replace(plan, ranks=ranks), policy_input.workload).makespan
    except PlanError:
        return inf


def _share(rows: list[list[float]], group: int, rank: int) -> float:
    """Return a rank's share of a group's work; 0 if there is no such work at all."""
    return rows[group][rank] if rows else 0.0
