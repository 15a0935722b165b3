"""The command `bigmac compare`: policies and backbones side by side, for one setting.

Knows the schedule package and the terminal; knows nothing of models, tensors or Lightning.
"""

import csv
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from bigmac_lightning.commands.answer import answer, parser_of
from bigmac_lightning.commands.plan import NO_MEMORY, check_suffix, options_of, sizes
from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.choose import Auto, Candidate, Case, candidates
from bigmac_lightning.schedule.comparison import comparison, numbers
from bigmac_lightning.schedule.make import POLICIES
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.workload import Workload


def compare_from_options(
    pipeline_parallel_size: int | None = None,
    microbatches: int | None = None,
    policies: str = ",".join(POLICIES),
    backbones: str = ",".join(BACKBONES),
    virtual_stages: str = "auto",
    group_size: int | Auto | None = None,
    costs: Costs = Costs(),  # noqa: B008  (frozen)
    workload: str | None = None,
    max_encoder_units: float | None = None,
    max_llm_microbatches: float | None = None,
    memory: MemoryBudget = NO_MEMORY,
    layers: int | None = None,
) -> tuple[Case, list[Candidate]]:
    """Plan a setting with each policy on each backbone.

    Args:
        pipeline_parallel_size: Number of ranks.
        microbatches: Number of microbatches; by default as many as the workload has.
        policies: Names, separated by commas.
        backbones: Names, or .csv or .json files, separated by commas.
        virtual_stages: Numbers of stages per rank, separated by commas; auto: what each backbone needs, or 2 and 4.
        group_size: Microbatches per group; by default the number of ranks. auto: that, half and twice of it.
        costs: Times of the actions, F, B, I and W of all the stages of a rank together.
        workload: JSON file with the work of each microbatch: [{"llm": 1, "encoder": [..], "generator": [..]}, ..].
        max_encoder_units: Most encoder units alive on a rank.
        max_llm_microbatches: Most LLM microbatches in flight on a rank.
        memory: Bytes, such as 16GiB, of an encoder unit, of an LLM microbatch on a rank, of what is always there, and
            the budget of a rank.
        layers: Layers of the LLM; stages that these do not make are told as such.
    """
    work = None if workload is None else Workload.load(workload)
    size, microbatches = sizes(pipeline_parallel_size, microbatches, work)
    known = memory if memory != NO_MEMORY else None
    case = Case(size, microbatches, costs, work, max_encoder_units, max_llm_microbatches, known, layers)
    stages = "auto" if virtual_stages == "auto" else [_integer(text) for text in virtual_stages.split(",")]
    return case, candidates(case, policies.split(","), backbones.split(","), stages, group_size)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = parser_of("compare", "Compare policies and backbones side by side.", compare_from_options)
    parser.add_argument(
        "--output", type=str, default=None, help="Write the numbers: .json or .csv. Default: the terminal."
    )
    return answer("compare", lambda: _run(options_of(parser, argv)))


def _run(options: dict[str, Any]) -> None:
    output = options.pop("output")
    suffix = check_suffix(output, (".json", ".csv"))
    case, rows = compare_from_options(**options)
    console = Console()
    if not output:
        console.print(comparison(case, rows))
        return
    records = numbers(case, rows)
    with open(output, "w", encoding="utf-8", newline="") as file:
        if suffix == ".json":
            json.dump(records, file, indent=1)
        else:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    console.print(f"{output}: {len(records)} rows", highlight=False, soft_wrap=True)


def _integer(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise ValueError(f"--virtual_stages has {text!r}; expected auto, or integers of at least 1 such as 2,4")
    return int(text)
