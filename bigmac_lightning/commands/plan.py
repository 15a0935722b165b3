"""The command `bigmac plan`: make a plan, or check an existing one, and show or save it.

Knows the schedule package and the terminal; knows nothing of models, tensors or Lightning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from bigmac_lightning.commands.answer import answer, parser_of
from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.bound import lower_bound
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.choose import Auto, Case, choose
from bigmac_lightning.schedule.draw import TerminalTimeline, picture, spans_of, table
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs, Plan, PlanError, ramp_groups
from bigmac_lightning.schedule.simulate import Timeline
from bigmac_lightning.schedule.verify import verify
from bigmac_lightning.schedule.workload import Workload

PICTURES = (".png", ".svg", ".pdf")


NO_MEMORY = MemoryBudget()


@dataclass(frozen=True)
class Made:
    """A verified plan with what belongs to it.

    Attributes:
        plan, timeline: what is shown.
        workload, memory, max_encoder_units: what it was made for, where given.
        reason: why this one, where something was "auto".
    """

    plan: Plan
    timeline: Timeline
    workload: Workload | None
    memory: MemoryBudget | None
    max_encoder_units: float | None
    reason: str = ""


def plan_from_options(
    pipeline_parallel_size: int | None = None,
    microbatches: int | None = None,
    backbone: str = "1f1b",
    policy: str = "nested",
    group_size: int | Auto | None = None,
    virtual_stages: int | Auto | None = None,
    extra_in_flight: int | None = None,
    costs: Costs = Costs(),  # noqa: B008  (frozen)
    workload: str | None = None,
    plan: str | None = None,
    max_encoder_units: float | None = None,
    max_llm_microbatches: float | None = None,
    memory: MemoryBudget = NO_MEMORY,
    layers: int | None = None,
    ramp: bool = False,
    pieces: int = 1,
    stage_costs: list[list[float]] | None = None,
) -> Made:
    """Make a plan, or read one, and verify it.

    Args:
        pipeline_parallel_size: Number of ranks.
        microbatches: Number of microbatches; by default as many as the workload has.
        backbone: The LLM-only schedule: gpipe, 1f1b, interleaved_1f1b, looped_bfs, zb1p, zbv, dualpipev, or a .csv or
            .json file. auto: the fastest within the caps.
        policy: How encoder and generator work is placed: nested, upfront, first_stage, filled, recompute,
            disaggregated.
        group_size: Microbatches per group; by default the number of ranks. auto: that, half or twice of it.
        virtual_stages: Stages per rank; by default as few as the backbone allows, or the fastest where it is auto.
        extra_in_flight: Microbatches in flight beyond those of the backbone.
        costs: Times of the actions, F, B, I and W of one stage (where something is auto: of all stages of a rank
            together). A kind whose cost is 0 does not occur.
        workload: JSON file with the work of each microbatch: [{"llm": 1, "encoder": [..], "generator": [..]}, ..].
        plan: Verify and show this plan file instead of making a plan.
        max_encoder_units: Most encoder units alive on a rank: `filled` uses them, plans with more are refused.
        max_llm_microbatches: Refuse plans with more LLM microbatches in flight on a rank.
        memory: Bytes, such as 16GiB, of an encoder unit, of an LLM microbatch on a rank, and of what is always there;
            plans above the budget are refused, and `filled` uses what is left.
        layers: Layers of the LLM, which limit what auto may choose as virtual_stages.
        ramp: Groups of 1, 1, 2, 4 .. group_size .. 2, 1, 1 microbatches: the pipeline waits for the first and the last.
        pieces: In how many pieces `filled` may cut an encoder share.
        stage_costs: Per stage, its times of F, B, I and W, where stages differ: [[1,2,1,1],[1.3,2.6,1.3,1.3]].
    """
    work = None if workload is None else Workload.load(workload)
    known = memory if memory != NO_MEMORY else None
    reason = ""
    if plan is not None:
        if pipeline_parallel_size is not None or microbatches is not None:
            raise ValueError("--plan takes everything from its file; leave out the options that make a new plan")
        made = Plan.load(plan)
    else:
        size, microbatches = sizes(pipeline_parallel_size, microbatches, work, " (or --plan FILE)")
        if "auto" in (backbone, group_size, virtual_stages):
            further = {"extra_in_flight": extra_in_flight, "ramp": ramp, "stage_costs": stage_costs}
            if given := [f"--{name}" for name, value in further.items() if value]:
                raise ValueError(f"{given[0]} does not go with auto; leave it out, or name what is auto")
            case = Case(size, microbatches, costs, work, max_encoder_units, max_llm_microbatches, known, layers)
            choice = choose(case, policy, backbone, virtual_stages, group_size)
            assert choice.best.plan is not None
            made, reason = choice.best.plan, choice.reason
        else:
            assert group_size != "auto"
            assert virtual_stages != "auto"
            made = make_plan(
                policy=policy,
                backbone=backbone,
                pipeline_parallel_size=size,
                microbatches=microbatches,
                group_size=group_size,
                costs=costs,
                virtual_stages=virtual_stages or get_backbone(backbone).virtual_stages[0],
                extra_in_flight=extra_in_flight,
                groups=ramp_groups(microbatches, group_size or size) if ramp else None,
                pieces=pieces,
                stage_costs=stage_costs,
                workload=work,
                max_encoder_units=max_encoder_units,
                memory=known,
            )
    timeline = verify(made, max_encoder_units, max_llm_microbatches, work, known)
    return Made(made, timeline, work, known, max_encoder_units, reason)


def sizes(
    pipeline_parallel_size: int | None, microbatches: int | None, work: Workload | None, otherwise: str = ""
) -> tuple[int, int]:
    """P and M, which must be given, M also by a workload; `otherwise` ends the error."""
    if microbatches is None and work is not None:
        microbatches = len(work.microbatches)
    if pipeline_parallel_size is None or microbatches is None:
        lacking = "pipeline_parallel_size" if pipeline_parallel_size is None else "microbatches"
        raise ValueError(f"--{lacking} is missing; expected an integer of at least 1{otherwise}")
    return pipeline_parallel_size, microbatches


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = parser_of("plan", "Make, check, show and save plans.", plan_from_options)
    parser.add_argument(
        "--output",
        type=str,
        default=None,
        help="Write plan.json, or a picture: .png, .svg, .pdf. Default: the terminal.",
    )
    return answer("plan", lambda: _run(options_of(parser, argv)))


def options_of(parser: ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """What is given, with costs and memory as the schedule has them."""
    options = vars(parser.parse_args(list(argv)))
    return {
        **options,
        "costs": Costs(**vars(options["costs"])),
        "memory": MemoryBudget(**vars(options["memory"])),
    }


def check_suffix(output: str | None, suffixes: Sequence[str]) -> str:
    """The suffix of a file to write; ``ValueError`` lists what is possible."""
    suffix = Path(output).suffix if output else ""
    if output and suffix not in suffixes:
        raise ValueError(f"--output is {output!r}; expected a name that ends with {', '.join(suffixes)}")
    return suffix


def _run(options: dict[str, Any]) -> None:
    output = options.pop("output")
    suffix = check_suffix(output, (".json", *PICTURES))
    made, console = plan_from_options(**options), Console()
    plan, timeline = made.plan, made.timeline
    if made.reason:
        console.print(made.reason, highlight=False, soft_wrap=True)
    if not output:
        bound = lower_bound(plan, made.max_encoder_units, made.workload)
        console.print(table(plan, timeline, bound, made.memory and made.memory.peaks(plan, made.workload)))
        console.print(TerminalTimeline(spans_of(plan, timeline)))
        return
    if suffix == ".json":
        plan.save(output)
    else:
        try:
            picture(plan, timeline, output, made.workload, made.memory)
        except ImportError as problem:
            raise PlanError("pictures need matplotlib: pip install 'bigmac-lightning[quickstart]'") from problem
    console.print(f"{output}: makespan {timeline.makespan:g}, ideal {plan.ideal:g}", highlight=False, soft_wrap=True)
