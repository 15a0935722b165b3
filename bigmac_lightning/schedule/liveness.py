"""Counts the encoder units and LLM microbatches whose activations are alive while each action of a plan runs.

Only the order of a rank's own list matters for this, not the times of its actions.
"""

from bigmac_lightning.schedule.action import Action, Kind
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.workload import Workload

FOLLOWERS: dict[Kind, tuple[Kind, ...]] = {"F": ("B",), "B": (), "I": ("W",), "W": ()}
"""Per kind, the kinds of later actions on the same stage and microbatch that still need its activations. ("B" stands
for both forms of the backward.) An action frees the activations if none of these kinds occurs on its stage."""


def group_units(plan: Plan, workload: Workload | None = None) -> list[float]:
    """Return the encoder units of each group: the number of its microbatches or, with a workload, its encoder time
    divided by that of the mean microbatch."""
    if workload is None:
        return [float(len(group)) for group in plan.groups]
    mean = workload.total("EF") / plan.microbatches
    return [workload.total("EF", group) / mean if mean else 0.0 for group in plan.groups]


def encoder_unit_steps(plan: Plan, workload: Workload | None = None) -> list[list[tuple[float, float]]]:
    """Per rank and position in its list, the encoder units alive while that action runs, and right after it.

    EF allocates the units of the rank's share at its start, and EB frees them at its end. If the plan has no EB, or if
    it recomputes, then each EF and each EB allocates them at its start and frees them at its end.
    """
    units, saves_activations = group_units(plan, workload), "EB" in plan.costs.kinds and not plan.recomputes
    ranks: list[list[tuple[float, float]]] = []
    for rank, actions in enumerate(plan.ranks):
        alive, row = 0.0, []
        for action in actions:
            during = after = alive
            if action.kind in ("EF", "EB"):
                size = units[action.index] * plan.encoder_shares[action.index][rank] / action.pieces
                if action.kind == "EB" and saves_activations:
                    after = max(0.0, alive - size)
                else:
                    during = alive + size
                    after = during if saves_activations else alive
            row.append((during, after))
            alive = after
        ranks.append(row)
    return ranks


def live_encoder_units(plan: Plan, workload: Workload | None = None) -> list[list[float]]:
    """Per rank and position in its list, the encoder units alive while that action runs."""
    return [[during for during, _ in row] for row in encoder_unit_steps(plan, workload)]


def generator_units(plan: Plan, rank: int) -> float:
    """The most microbatches' worth of targets that a rank's generator works on at a time."""
    return max(
        (
            plan.generator_shares[action.index][rank] * len(plan.groups[action.index]) / action.pieces
            for action in plan.ranks[rank]
            if action.kind == "G"
        ),
        default=0.0,
    )


def llm_microbatch_steps(plan: Plan) -> list[list[tuple[float, float]]]:
    """Per rank and position in its list, the LLM microbatches alive while that action runs, and right after it.

    F allocates a microbatch's activations on its stage at its start, and the last action on that stage and microbatch
    frees them at its end: B or W, or I on a frozen stage, or F without a backward. A rank has V stages, and the
    activations of each of them count as 1 / V microbatch.
    """
    size = 1 / plan.virtual_stages
    frees = {
        (kind, stage): not any(plan.occurs(Action(later, 0, stage)) for later in followers)
        for stage in range(plan.stages)
        for kind, followers in FOLLOWERS.items()
    }
    ranks: list[list[tuple[float, float]]] = []
    for actions in plan.ranks:
        stages, row = 0, []
        for action in actions:
            stages += action.kind == "F"
            during = stages
            if action.stage is not None:
                stages -= frees[action.kind, action.stage]
            row.append((during * size, stages * size))
        ranks.append(row)
    return ranks


def live_llm_microbatches(plan: Plan) -> list[list[float]]:
    """Per rank and position in its list, the LLM microbatches alive while that action runs."""
    return [[during for during, _ in row] for row in llm_microbatch_steps(plan)]
