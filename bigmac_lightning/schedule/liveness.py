"""What is alive in memory while each action of a plan runs.

Knows which actions hold and free activations; knows nothing of times, as a rank's list order says it all.
"""

from bigmac_lightning.schedule.action import Action, Kind
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.workload import Workload

FOLLOWERS: dict[Kind, tuple[Kind, ...]] = {"F": ("B",), "B": (), "I": ("W",), "W": ()}
"""What still needs a microbatch's activations after an action on it, on the same stage."""


def group_units(plan: Plan, workload: Workload | None = None) -> list[float]:
    """Encoder units of each group: its number of microbatches, or, where microbatches differ, its encoder work
    in multiples of the mean microbatch's."""
    if workload is None:
        return [float(len(group)) for group in plan.groups]
    mean = workload.total("EF") / plan.microbatches
    return [workload.total("EF", group) / mean if mean else 0.0 for group in plan.groups]


def encoder_unit_steps(plan: Plan, workload: Workload | None = None) -> list[list[tuple[float, float]]]:
    """Per rank and position, the encoder units alive while that action runs, and right after it.

    EF takes them at its start; EB frees them at its end (without EB, EF at its own end). Where a plan recomputes, both
    take them and free them.
    """
    units, kept = group_units(plan, workload), "EB" in plan.costs.kinds and not plan.recomputes
    ranks: list[list[tuple[float, float]]] = []
    for rank, actions in enumerate(plan.ranks):
        alive, row = 0.0, []
        for action in actions:
            during = after = alive
            if action.kind in ("EF", "EB"):
                size = units[action.index] * plan.encoder_shares[action.index][rank] / action.pieces
                if action.kind == "EB" and kept:
                    after = max(0.0, alive - size)
                else:
                    during = alive + size
                    after = during if kept else alive
            row.append((during, after))
            alive = after
        ranks.append(row)
    return ranks


def live_encoder_units(plan: Plan, workload: Workload | None = None) -> list[list[float]]:
    """Per rank and position, the encoder units alive while that action runs."""
    return [[during for during, _ in row] for row in encoder_unit_steps(plan, workload)]


def llm_microbatch_steps(plan: Plan) -> list[list[tuple[float, float]]]:
    """Per rank and position, the LLM microbatches alive while that action runs, and right after it; one stage of V
    counts 1 / V.

    F takes them at its start; B or W frees them at its end (I if no W follows, F if no backward does).
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
    """Per rank and position, the LLM microbatches alive while that action runs."""
    return [[during for during, _ in row] for row in llm_microbatch_steps(plan)]
