"""The command `bigmac plan`: make a plan, or check an existing one, and show or save it.

Knows the schedule package and the terminal; knows nothing of models, tensors or Lightning.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console

from bigmac_lightning.schedule.draw import TerminalTimeline, picture, spans_of, table
from bigmac_lightning.schedule.plan import Costs, Plan, PlanError
from bigmac_lightning.schedule.policies import make_plan
from bigmac_lightning.schedule.simulate import Timeline
from bigmac_lightning.schedule.verify import verify
from bigmac_lightning.schedule.workload import Workload

PICTURES = (".png", ".svg", ".pdf")


def plan_from_options(
    pipeline_parallel_size: int | None = None,
    microbatches: int | None = None,
    backbone: str = "1f1b",
    policy: str = "nested",
    group_size: int | None = None,
    virtual_stages: int = 1,
    extra_in_flight: int | None = None,
    costs: Costs = Costs(),  # noqa: B008  (frozen)
    workload: str | None = None,
    plan: str | None = None,
    max_encoder_units: float | None = None,
    max_llm_microbatches: float | None = None,
) -> tuple[Plan, Timeline, Workload | None]:
    """Make a plan, or read one, and verify it.

    Args:
        pipeline_parallel_size: Number of ranks.
        microbatches: Number of microbatches; by default as many as the workload has.
        backbone: The LLM-only schedule: gpipe, 1f1b, interleaved_1f1b, looped_bfs, zb1p, zbv, dualpipev.
        policy: How encoder and generator work is placed: nested, upfront, first_stage, filled, recompute,
            disaggregated.
        group_size: Microbatches per group; by default the number of ranks.
        virtual_stages: Stages per rank.
        extra_in_flight: Microbatches in flight beyond those of the backbone.
        costs: Times of the actions. A kind whose cost is 0 does not occur.
        workload: JSON file with the work of each microbatch: [{"llm": 1, "encoder": [..], "generator": [..]}, ..].
        plan: Verify and show this plan file instead of making a plan.
        max_encoder_units: Most encoder units alive on a rank: `filled` uses them, plans with more are refused.
        max_llm_microbatches: Refuse plans with more LLM microbatches in flight on a rank.
    """
    work = None if workload is None else Workload.load(workload)
    if plan is not None:
        if pipeline_parallel_size is not None or microbatches is not None:
            raise ValueError("--plan takes everything from its file; leave out the options that make a new plan")
        made = Plan.load(plan)
    else:
        if microbatches is None and work is not None:
            microbatches = len(work.microbatches)
        if pipeline_parallel_size is None or microbatches is None:
            lacking = "pipeline_parallel_size" if pipeline_parallel_size is None else "microbatches"
            raise ValueError(f"--{lacking} is missing; expected an integer of at least 1 (or --plan FILE)")
        made = make_plan(
            policy=policy,
            backbone=backbone,
            pipeline_parallel_size=pipeline_parallel_size,
            microbatches=microbatches,
            group_size=group_size,
            costs=costs,
            virtual_stages=virtual_stages,
            extra_in_flight=extra_in_flight,
            workload=work,
            max_encoder_units=max_encoder_units,
        )
    return made, verify(made, max_encoder_units, max_llm_microbatches, work), work


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code: 0, or 2 after an error, which goes to stderr in one line
    (for a plan that cannot progress, with every rank's list around its spot below)."""
    parser = ArgumentParser(
        prog="bigmac plan", description="Make, check, show and save plans.", exit_on_error=False, default_env=False
    )
    parser.add_function_arguments(plan_from_options, fail_untyped=True)
    parser.add_argument(
        "--output",
        type=str,
        default=None,
        help="Write plan.json, or a picture: .png, .svg, .pdf. Default: the terminal.",
    )
    try:
        options = vars(parser.parse_args(list(argv)))
        options["costs"] = Costs(**vars(options["costs"]))
        output = options.pop("output")
        suffix = Path(output).suffix if output else ""
        if output and suffix not in (".json", *PICTURES):
            raise ValueError(f"--output is {output!r}; expected a name that ends with .json, {', '.join(PICTURES)}")
        plan, timeline, work = plan_from_options(**options)
        _put_out(plan, timeline, work, output, suffix)
    except (ValueError, ArgumentError, OSError) as problem:
        print(f"bigmac plan: error: {_told(problem)}", file=sys.stderr)
        return 2
    return 0


def _put_out(plan: Plan, timeline: Timeline, work: Workload | None, output: str | None, suffix: str) -> None:
    console = Console()
    if not output:
        console.print(table(plan, timeline))
        console.print(TerminalTimeline(spans_of(plan, timeline)))
        return
    if suffix == ".json":
        plan.save(output)
    else:
        try:
            picture(plan, timeline, output, work)
        except ImportError as problem:
            raise PlanError("pictures need matplotlib: pip install 'bigmac-lightning[quickstart]'") from problem
    console.print(f"{output}: makespan {timeline.makespan:g}, ideal {plan.ideal:g}", highlight=False, soft_wrap=True)


def _told(problem: Exception) -> str:
    """The problem's message; jsonargparse's many lines on a wrong type made one."""
    text = str(problem)
    pattern = r"""Parser key "(.*?)":.*?Expected (?:an? )?<class '(.*?)'>.*G(?:iven|ot) value: (.*)"""
    wrong = re.match(pattern, text, re.DOTALL)
    if wrong:
        key, expected, found = wrong.groups()
        return f"--{key} is {found.strip()}; expected {expected}"
    return " ".join(text.split()) if isinstance(problem, ArgumentError) else text
