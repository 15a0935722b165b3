"""Shows candidates side by side: a table for the terminal, and the numbers in it for files."""

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
* the fastest
V: stages per rank
ratio: to the ideal, which is plain 1F1B and the nested work spread evenly
bubble %: of the rank with the least and of that with the most
units, mbs: most encoder units and LLM microbatches alive on a rank
plan s: seconds of planning"""


def numbers(request: PlanRequest, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """One flat record per candidate: its options, "makespan", its "ratio" to the ideal, "bubble_share_min" and "_max"
    over the ranks, the peaks of the rank with the highest ones ("peak_memory" in bytes), "planning_seconds" and
    "problem". Values that do not apply are ``None``."""
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
    """A table of the candidates in the order given, the fastest marked; below it, why others have no plan."""
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
        table.add_column(heading, overflow="ellipsis")  # these give way in a narrow terminal
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
    """One line for each reason, with all candidates that it refuses."""
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
    plan = candidate.plan
    if plan is None or not plan.makespan:
        return []
    return [bubble / plan.makespan for bubble in simulate(plan, request.workload).bubbles]
