"""The command `bigmac plan`: make a plan, or check an existing one, and show or save it."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from bigmac_lightning.commands.answer import answer
from bigmac_lightning.commands.request import check_suffix, plan_parser, request_of
from bigmac_lightning.schedule.bound import lower_bound
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.choose import choose
from bigmac_lightning.schedule.draw import TerminalTimeline, picture, plan_title, spans_of, table
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Plan, PlanError
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import Timeline
from bigmac_lightning.schedule.verify import verify
from bigmac_lightning.schedule.viewer.page import planned_track, write_page
from bigmac_lightning.schedule.workload import Workload
from bigmac_lightning.whole_tables import print_whole

PICTURES = (".png", ".svg", ".pdf")
OUTPUTS = (".json", ".html", *PICTURES)
OUTPUT = "Write plan.json, a page for browsers: .html, or a picture: .png, .svg, .pdf. Default: the terminal."
CHECKED = ("plan", "output", "workload", "memory", "max_encoder_units", "max_llm_microbatches")
"""The options that apply to the plan of a file."""

STAGE_COSTS: Any = list[list[float]] | None
TEXT: Any = str | None


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = plan_parser("plan", "Make, check, show and save plans.")
    stage_costs = "Per stage, its times of F, B, I and W, where stages differ: [[1,2,1,1],[1.3,2.6,1.3,1.3]]."
    parser.add_argument("--stage_costs", type=STAGE_COSTS, default=None, help=stage_costs)
    parser.add_argument("--plan", type=TEXT, default=None, help="Check and show this plan file instead of making one.")
    parser.add_argument("--output", type=TEXT, default=None, help=OUTPUT)
    return answer("plan", lambda: _run(parser.parse_args(list(argv)), parser.get_defaults()))


def _run(arguments: Namespace, defaults: Namespace) -> None:
    check_suffix(arguments.output, OUTPUTS)
    console = Console()
    if arguments.plan is None:
        request = request_of(arguments, " (or --plan FILE)", stage_costs=arguments.stage_costs)
        plan, reason = _make(request)
        workload, memory = request.workload, request.memory
    else:
        plan, workload, memory = _read(arguments, defaults)
        reason = ""
    limits = (arguments.max_encoder_units, arguments.max_llm_microbatches)
    timeline = verify(plan, *limits, workload, memory)
    if reason:
        console.print(reason, highlight=False, soft_wrap=True)
    if not arguments.output:
        bound = lower_bound(plan, arguments.max_encoder_units, workload)
        print_whole(console, table(plan, timeline, bound, memory and memory.peaks(plan, workload)))
        console.print(TerminalTimeline(spans_of(plan, timeline)))
    else:
        write_plan(plan, timeline, arguments.output, workload, memory, console)


def write_plan(
    plan: Plan,
    timeline: Timeline,
    output: str,
    workload: Workload | None,
    memory: MemoryBudget | None,
    console: Console,
) -> None:
    """Write a plan as a file of one of the `OUTPUTS`, and say so."""
    if output.endswith(".json"):
        plan.save(output)
    elif output.endswith(".html"):
        write_page(output, plan_title(plan), [planned_track(plan, timeline, workload, memory)])
    else:
        try:
            picture(plan, timeline, output, workload, memory)
        except ImportError as problem:
            raise PlanError("pictures need matplotlib: pip install 'bigmac-lightning[quickstart]'") from problem
    text = f"{output}: makespan {timeline.makespan:g}, ideal {plan.ideal:g}"
    console.print(text, highlight=False, soft_wrap=True)


def _make(request: PlanRequest) -> tuple[Plan, str]:
    """The plan that is asked for, and why this one where something was "auto"."""
    if not request.has_auto:
        return make_plan(request), ""
    choice = choose(request)
    assert choice.best.plan is not None
    return choice.best.plan, choice.reason


def _read(arguments: Namespace, defaults: Namespace) -> tuple[Plan, Workload | None, MemoryBudget | None]:
    """The plan of a file, and the workload and the memory that it is checked against.

    Raises:
        ValueError: an option is given that only a new plan could follow.
    """
    ignored = [name for name in vars(defaults) if name not in CHECKED and arguments[name] != defaults[name]]
    if ignored:
        raise ValueError(f"--plan takes everything from its file; leave out --{', --'.join(ignored)}")
    plan = Plan.load(arguments.plan)
    arguments.pipeline_parallel_size, arguments.microbatches = plan.pipeline_parallel_size, plan.microbatches
    request = request_of(arguments)
    return plan, request.workload, request.memory
