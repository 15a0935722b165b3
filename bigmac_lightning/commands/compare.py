"""The command `bigmac compare`: policies and backbones side by side, for one batch."""

import csv
import json
from collections.abc import Sequence

from jsonargparse import Namespace
from rich.console import Console

from bigmac_lightning.commands.answer import answer
from bigmac_lightning.commands.request import check_suffix, plan_parser, request_of
from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.choose import Candidate, candidates
from bigmac_lightning.schedule.comparison import comparison, numbers
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.schedule.viewer.page import planned_track, write_page
from bigmac_lightning.whole_tables import print_whole

MOST_TIMELINES = 8
"""As many timelines as one page has; a browser's canvas cannot be of any height."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = plan_parser(
        "compare", "Compare policies and backbones side by side.", {"policy", "backbone", "virtual_stages"}
    )
    names = "Names, separated by commas."
    parser.add_argument("--policies", type=str, default=",".join(POLICIES), help=names)
    files = "Names, or .csv or .json files, separated by commas."
    parser.add_argument("--backbones", type=str, default=",".join(BACKBONES), help=files)
    stages = "Numbers of stages per rank, separated by commas; auto: what each backbone needs, or 2 and 4."
    parser.add_argument("--virtual_stages", type=str, default="auto", help=stages)
    output = "Write the numbers: .json or .csv, or a page with the fastest plans: .html. Default: the terminal."
    parser.add_argument("--output", type=str, default=None, help=output)
    return answer("compare", lambda: _run(parser.parse_args(list(argv))))


def _run(arguments: Namespace) -> None:
    output, numbers_of_stages = arguments.output, arguments.pop("virtual_stages")
    suffix = check_suffix(output, (".json", ".csv", ".html"))
    request = request_of(arguments)
    stages = "auto" if numbers_of_stages == "auto" else [_integer(text) for text in numbers_of_stages.split(",")]
    rows = candidates(request, arguments.policies.split(","), arguments.backbones.split(","), stages)
    console = Console()
    if not output:
        print_whole(console, comparison(request, rows))
        return
    if suffix == ".html":
        count = _write_page(output, request, rows)
        console.print(f"{output}: {count} of {len(rows)} combinations", highlight=False, soft_wrap=True)
        return
    records = numbers(request, rows)
    with open(output, "w", encoding="utf-8", newline="") as file:
        if suffix == ".json":
            json.dump(records, file, indent=1)
        else:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    console.print(f"{output}: {len(records)} rows", highlight=False, soft_wrap=True)


def _write_page(path: str, request: PlanRequest, rows: Sequence[Candidate]) -> int:
    """Write a page with the timelines of the fastest plans, one below the other; returns how many there are."""
    tracks = [
        planned_track(
            row.plan,
            simulate(row.plan, request.workload),
            request.workload,
            request.memory,
            name=f"{row.policy} on {row.backbone}" + (f" (V={row.virtual_stages})" if row.virtual_stages > 1 else ""),
        )
        for row in rows
        if row.plan is not None
    ][:MOST_TIMELINES]
    if not tracks:
        raise ValueError("no combination has a plan; without --output the reasons are listed")
    write_page(path, f"{request.pipeline_parallel_size} ranks, {request.microbatches} microbatches", tracks)
    return len(tracks)


def _integer(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise ValueError(f"--virtual_stages has {text!r}; expected auto, or integers of at least 1 such as 2,4")
    return int(text)
