"""The arguments that `bigmac plan` and `bigmac compare` share, and the request for plans that they make."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from bigmac_lightning.commands.answer import PARSER, Parser
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.measured_costs import MeasuredCosts
from bigmac_lightning.schedule.request import PlanRequest, ScheduleOptions
from bigmac_lightning.schedule.workload import Workload


@dataclass(frozen=True)
class BatchArguments:
    """The batch and the pipeline that plans are made for.

    Attributes:
        pipeline_parallel_size: Number of ranks.
        microbatches: Number of microbatches; by default as many as the workload has.
        workload: JSON file with the work of each microbatch: [{"llm": 1, "encoder": [..], "generator": [..]}, ..].
        layers: Layers of the LLM, which limit what auto may choose as virtual_stages.
    """

    pipeline_parallel_size: int | None = None
    microbatches: int | None = None
    workload: str | None = None
    layers: int | None = None


def plan_parser(name: str, description: str, without: Collection[str] = ()) -> ArgumentParser:
    """A parser for a command about plans.

    Args:
        without: schedule options that the command does not have.
    """
    parser = Parser(prog=f"bigmac {name}", description=description, default_env=False, **PARSER)
    parser.add_class_arguments(BatchArguments, as_group=False)
    parser.add_class_arguments(ScheduleOptions, as_group=False, skip={*without, "memory"})
    parser.add_class_arguments(MemoryBudget, "memory", help="bytes of a rank's memory")
    return parser


def request_of(arguments: Namespace, otherwise: str = "", **further: Any) -> PlanRequest:
    """The request for plans that the parsed arguments make.

    Args:
        otherwise: the end of the error about a missing size.
        further: fields of the request that have no argument.

    Raises:
        ValueError: the number of ranks or of microbatches is missing, or an option is not possible.
    """
    given = {entry.name: arguments[entry.name] for entry in fields(ScheduleOptions) if entry.name in arguments}
    if isinstance(given["costs"], Namespace):
        given["costs"] = Costs(**vars(given["costs"]))
    memory = MemoryBudget(**vars(arguments.memory))
    workload = None if arguments.workload is None else Workload.load(arguments.workload)
    size, microbatches = arguments.pipeline_parallel_size, arguments.microbatches
    if microbatches is None and workload is not None:
        microbatches = len(workload.microbatches)
    if size is None or microbatches is None:
        lacking = "pipeline_parallel_size" if size is None else "microbatches"
        raise ValueError(f"--{lacking} is missing; expected an integer of at least 1{otherwise}")
    further |= {"workload": workload, "layers": arguments.layers}
    options = ScheduleOptions(**given)
    if options.costs_file is not None:
        known = MeasuredCosts.load(options.costs_file)
        options, memory = replace(options, costs=known.costs(size)), known.memory(memory, size)
        if further.get("stage_costs", ()) is None and not options.has_auto and not options.own_ranks:
            further["stage_costs"] = known.stage_costs(size, options.stages_per_rank)
    options = replace(options, memory=memory if memory != MemoryBudget() else None)
    return options.request(size, microbatches, **further)


def check_suffix(output: str | None, suffixes: Sequence[str]) -> str:
    """The suffix of a file to write; ``ValueError`` lists what is possible."""
    suffix = Path(output).suffix if output else ""
    if output and suffix not in suffixes:
        raise ValueError(f"--output is {output!r}; expected a name that ends with {', '.join(suffixes)}")
    return suffix
