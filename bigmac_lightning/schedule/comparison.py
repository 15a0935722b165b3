"""Shows candidates side by side, as a table for the terminal and as records for files."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from bigmac_lightning.schedule.budget import size_text
from bigmac_lightning.schedule.choose import Candidate, ideal_makespan
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import simulate

LEGEND = """\
*: the fastest plan
V: stages per rank
ratio: makespan over the ideal, which is plain 1F1B plus the nested work spread evenly over the ranks
bubble %: idle time of the rank with the least and of the rank with the most, as a percentage of the makespan
units, mbs: the most encoder units and LLM microbatches alive on a rank
plan s: seconds that planning took"""


def numbers(request: PlanRequest, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Return one flat record per candidate. Values that do not apply are ``None``.

    A record has the candidate's options; "makespan", "ideal" and their "ratio"; "bubble_share_min" and
    "bubble_share_max", the smallest and the largest idle time of a rank as a fraction of the makespan;
    "peak_encoder_units", "peak_llm_microbatches" and "peak_memory" (bytes), each on the rank where it is highest;
    "planning_seconds"; and "problem", the reason why there is no plan.
    """
    ideal = ideal_makespan(request)
    records: list[dict[str, Any]] = []
    for candidate in candidates:
        plan = candidate.plan
        bubbles = _bubble_shares(request, candidate)
        records.append(
            {
                "policy": candidate.policy,
                "backbone": candidate.backbone,
                "virtual_stages": candidate.virtual_stages,
                "group_size": candidate.group_size,
                "makespan": plan and plan.makespan,
                "ideal": ideal,
                "ratio": plan and plan.makespan / ideal,
                "bubble_share_min": min(bubbles, default=None),
                "bubble_share_max": max(bubbles, default=None),
                "peak_encoder_units": plan and max(plan.peak["encoder_units"], default=0.0),
                "peak_llm_microbatches": plan and max(plan.peak["llm_microbatches"], default=0.0),
                "peak_memory": max(candidate.memory, default=None),
                "planning_seconds": plan and candidate.seconds,
                "problem": candidate.problem,
            }
        )
    return records


def comparison(request: PlanRequest, candidates: Sequence[Candidate]) -> Group:
    """Return a table of the candidates in the given order, with the fastest marked and, below it, the reasons why
    candidates have no plan."""
    records = numbers(request, candidates)
    made = [record for record in records if not record["problem"]]
    best = min((record["makespan"] for record in made), default=0.0)
    sizes = f"{request.pipeline_parallel_size} ranks, {request.microbatches} microbatches"
    table = Table(
        title=f"{sizes}, ideal {records[0]['ideal']:g}",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for heading in ("policy", "backbone"):
        table.add_column(heading)
    headings = ["V", "group", "makespan", "ratio", "bubble %", "units", "mbs"]
    for heading in headings + ["memory"] * (request.memory is not None) + ["plan s"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for record in made:
        first = record["makespan"] <= best * (1 + 1e-9)
        table.add_row(
            record["policy"],
            record["backbone"],
            str(record["virtual_stages"]),
            str(record["group_size"]),
            f"{record['makespan']:.6g}" + ("*" if first else " "),
            f"{record['ratio']:.3f}",
            _range(record["bubble_share_min"], record["bubble_share_max"]),
            f"{record['peak_encoder_units']:.3g}",
            f"{record['peak_llm_microbatches']:g}",
            *([size_text(record["peak_memory"])] if request.memory is not None else []),
            f"{record['planning_seconds']:.2f}",
            style="bold green" if first else None,
        )
    notes = [LEGEND] * bool(made) + _refusals(candidates)
    return Group(table, "", *(Text(note) for note in notes))


def _range(least: float, most: float) -> str:
    one, other = f"{100 * least:.0f}", f"{100 * most:.0f}"
    return one if one == other else f"{one}-{other}"


def _refusals(candidates: Sequence[Candidate]) -> list[str]:
    """Return one line for each reason, with all candidates that have no plan for this reason."""
    reasons: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate.problem:
            stages = f" (V={candidate.virtual_stages})" if candidate.virtual_stages > 1 else ""
            reasons.setdefault(candidate.problem, []).append(f"{candidate.policy} on {candidate.backbone}{stages}")
    return [
        f"no plan: {', '.join(names) if len(names) < len(candidates) else 'all'}: {reason}"
        for reason, names in reasons.items()
    ]


def _bubble_shares(request: PlanRequest, candidate: Candidate) -> list[float]:
    """Per rank, the idle time as a fraction of the makespan; empty if there is no plan."""
    plan = candidate.plan
    if plan is None or not plan.makespan:
        return []
    return [bubble / plan.makespan for bubble in simulate(plan, request.workload).bubbles]
