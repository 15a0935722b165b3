"""The command `bigmac plan --config`: shows what each rank of a run will need and how its batches will be planned.

It builds the model on the meta device and the strategy. It starts no processes and reads neither data nor weights. If
the processor of a MultimodalDataModule is there, its tokens are checked against the model, as in a run.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from bigmac_lightning.commands.answer import answer
from bigmac_lightning.commands.config import ConfigReader
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.ranks import Precision
from bigmac_lightning.estimates.step import StepEstimate
from bigmac_lightning.estimates.table import count_text, partition_table
from bigmac_lightning.runtime.mesh import mesh_shape
from bigmac_lightning.schedule.draw import TerminalTimeline, spans_of, table
from bigmac_lightning.schedule.measured_costs import MeanWork
from bigmac_lightning.training.known_costs import check_known, measured_at, scaling_text
from bigmac_lightning.training.options import OPTION_OF, PipelineOptions
from bigmac_lightning.training.stages import resolve_options
from bigmac_lightning.training.strategy import BigMacStrategy
from bigmac_lightning.whole_tables import print_whole

HELP = {
    "tokens": "tokens of a microbatch, all labelled; default: the data's token_budget, or 4096",
    "media_rows": "feature rows of a microbatch; default: a quarter of its tokens if there are encoders",
    "item_rows": "feature rows of a media item; default: the data's visual.max_rows, or 256",
    "targets": "generator targets of a microbatch; default: 1 if there are generators",
    "target_rows": "condition rows of a target; default: the data's target.rows, or 64",
    "target_shape": "shape of a target; default: the data's target.shape, or [3, 512, 512]",
}

OF_ONE_STEP = (
    "this is the plan of a step whose microbatches are all alike; a training plans each batch for the tokens, media "
    "and targets that it has"
)


class RunReader(ConfigReader):
    """Builds the model and the strategy of a config.

    Attributes:
        model: the model, on the meta device.
        strategy: the strategy of the run.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        optional: Any = int | None
        parser.add_argument(
            "--microbatches", type=optional, help="microbatches of a step; default: the config's, or 4 per rank"
        )
        for field in fields(TypicalMicrobatch):
            kind: Any = list[int] | None if field.name == "target_shape" else optional
            parser.add_argument(f"--microbatch.{field.name}", type=kind, help=HELP[field.name])
        super().add_arguments_to_parser(parser)

    def instantiate_classes(self) -> None:
        """Instantiate the model and the trainer's strategy, and nothing else."""
        strategy = self.config["trainer"]["strategy"]
        wanted = Namespace(model=self.config["model"], trainer=Namespace(strategy=strategy))
        made = self.parser.instantiate_classes(wanted)
        self.model, self.strategy = made["model"], made["trainer"]["strategy"]
        if self.strategy == BigMacStrategy.strategy_name:
            self.strategy = BigMacStrategy()
        if not isinstance(self.strategy, BigMacStrategy):
            raise ValueError(f"trainer.strategy is {strategy!r}; plans are made for bigmac, so choose that")

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        trainer = self.config["trainer"]
        devices = trainer["devices"]
        if isinstance(devices, list):
            devices = len(devices)
        if not str(devices).isdigit():
            raise ValueError(f"trainer.devices is {devices!r}; a plan needs their number, such as --trainer.devices 8")
        return int(devices) * self.strategy.ranks_per_device * trainer["num_nodes"]

    def of_data(self, *path: str) -> Any:
        """An argument of the DataModule, or of one of its arguments; ``None`` if there is none of that name."""
        value: Any = self.config.get("data")
        for name in path:
            if not isinstance(value, Namespace):
                return None
            value = value.get("init_args", value).get(name)
        return value

    def check_data(self) -> None:
        """Check the DataModule without its sources, if its processor is in a folder here.

        Raises:
            ValueError: the DataModule cannot be made, or the model cannot take its batches.
        """
        processor = self.of_data("processor")
        if not isinstance(processor, str) or not (processor == "bytes" or Path(processor).is_dir()):
            return
        data = self.config["data"].clone()
        for name in ("train", "val", "test", "predict"):
            if self.of_data(name):
                data["init_args"][name] = []
        if self.of_data("mixture") is not None:
            data["init_args"]["mixture"]["weights"] = data["init_args"]["mixture"]["val_split"] = None
        self.parser.instantiate_classes(Namespace(data=data))["data"].check(self.model)

    def microbatch(self) -> TypicalMicrobatch:
        """The microbatch by the command's arguments, or else by those of the data, or else by default."""
        amounts = {
            "tokens": self.of_data("token_budget"),
            "item_rows": self.of_data("visual", "max_rows"),
            "target_rows": self.of_data("target", "rows"),
            "target_shape": self.of_data("target", "shape"),
        }
        given = {name: value for name, value in vars(self.config["microbatch"]).items() if value is not None}
        known = amounts | given
        made = TypicalMicrobatch.of_data(known, bool(self.model.encoders), bool(self.model.generators))
        measured = {} if self.strategy.options.known is None else _amounts(self.strategy.options.known.work)
        shape = {"target_shape": tuple(given["target_shape"])} if "target_shape" in given else {}
        return replace(made, **(measured | given | shape))


def _amounts(work: MeanWork) -> dict[str, Any]:
    """The microbatch that was measured."""
    amounts = {"tokens": work.tokens, "media_rows": work.rows, "targets": work.targets}
    amounts |= {"item_rows": work.rows / work.items} if work.items else {}
    amounts |= {"target_rows": work.target_rows / work.targets} if work.targets else {}
    shape = {"target_shape": work.target_shape} if work.targets else {}
    return {name: math.ceil(number) for name, number in amounts.items()} | shape


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return answer("plan", lambda: _show(RunReader("plan", argv), Console()), further=[TypeError])


@dataclass(frozen=True)
class Estimated:
    """What is told of a run before it starts.

    Attributes:
        estimate: the estimate of a step.
        options, stages: those that the run will have.
        reason: why "auto" became what it is.
        microbatch, microbatches: what a microbatch holds, and their number in a step.
        replicas, size: the numbers of pipelines, and of the ranks of each.
    """

    estimate: StepEstimate
    options: PipelineOptions
    stages: list[range]
    reason: str
    microbatch: TypicalMicrobatch
    microbatches: int
    replicas: int
    size: int

    @property
    def seconds(self) -> float | None:
        """Seconds of a step, if its costs were measured."""
        known = self.options.known
        return None if known is None else self.estimate.timeline.makespan + known.beside


def estimated(run: RunReader) -> Estimated:
    """Estimate a step of a run.

    Raises:
        ValueError: the run is not possible, or its costs were measured for another one.
    """
    module, strategy, microbatch = run.model, run.strategy, run.microbatch()
    assert isinstance(module, PipelineModule)
    dp, size = mesh_shape(run.world_size, *strategy.sizes, peers=strategy.options.parallel.peers)
    if refused := module.llm.why_not_parallel(strategy.options.parallel):
        raise ValueError(refused)
    if strategy.options.known is not None:
        file = str(strategy.options.schedule.costs_file)
        check_known(strategy.options.known, file, module, run.config["trainer"]["precision"])
    options, stages, reason = resolve_options(module, strategy.options, size, microbatch)
    microbatches = run.config["microbatches"] or options.microbatches or run.of_data("microbatches") or 4 * size
    module.adapt()
    name = run.config["trainer"]["precision"]
    costs_given, known, measured = strategy.options.schedule.given_costs is not None, options.known, None
    if known is not None:
        work = known.work.with_amounts(microbatch.tokens, microbatch.media_rows, microbatch.targets)
        measured = measured_at(known, module, stages, options, work)
    estimate = StepEstimate(
        module, options, stages, size, microbatch, microbatches, Precision.of(name), not costs_given, dp, measured
    )
    return Estimated(estimate, options, stages, reason, microbatch, microbatches, dp, size)


def _show(run: RunReader, console: Console) -> None:
    run.check_data()
    found = estimated(run)
    estimate, options, known = found.estimate, found.options, found.options.known
    if found.reason:
        console.print(found.reason, highlight=False, soft_wrap=True)
    console.print(_components(run.model), highlight=False, soft_wrap=True)
    ranks = partition_table(estimate.ranks)
    ranks.caption = _assumptions(run, found.microbatch, found.microbatches, found.replicas, found.size)
    print_whole(console, ranks)
    costs = ", ".join(f"{kind}: {cost:.4g}" for kind, cost in asdict(estimate.costs).items() if cost)
    if known is not None:
        scaling = scaling_text(known, found.stages, options.parallel)
        console.print(
            f"costs of the plan, in seconds, by {options.schedule.costs_file}, measured on {known.device}: "
            f"{{{costs}}}{scaling and f' ({scaling})'}\n"
            f"a step takes {found.seconds:.4g} s: {estimate.timeline.makespan:.4g} s by the plan, and "
            f"{known.beside:.4g} s for sums of gradients, the optimizer, and what is done before the first action",
            highlight=False,
            soft_wrap=True,
        )
    elif run.strategy.options.schedule.given_costs is not None:
        console.print(f"costs of the plan, as the config says: {{{costs}}}", highlight=False, soft_wrap=True)
    else:
        console.print(
            f"costs of the plan, estimated, in TFLOP: {{{costs}}}\n(training begins with these ratios if the data say "
            "how many tokens a microbatch has, as MultimodalDataModule does, and otherwise with F: 1, B: 2, EF: 1, "
            "EB: 2, G: 3; it goes on with the times that it has measured, unless the config gives costs)",
            highlight=False,
            soft_wrap=True,
        )
    console.print(OF_ONE_STEP, highlight=False, soft_wrap=True)
    print_whole(console, table(estimate.plan, estimate.timeline))
    console.print(TerminalTimeline(spans_of(estimate.plan, estimate.timeline)))


def _components(module: PipelineModule) -> str:
    """How many parameters each component has."""
    parts = {"llm": module.llm}
    parts |= {f"encoders.{name}": part for name, part in module.encoders.items()}
    parts |= {f"generators.{name}": part for name, part in module.generators.items()}
    lines: list[str] = []
    for name, part in parts.items():
        weights = list(part.parameters())
        whole, trained = (
            sum(p.numel() for p in weights),
            sum(p.numel() for p in weights if p.requires_grad),
        )
        lines.append(f"{name}: {count_text(whole)} parameters, {count_text(trained)} of them trained")
    return "\n".join(lines)


def _shards(options: PipelineOptions) -> str:
    """Which of them lie in shards, and how."""
    sharding = options.sharding
    kinds = {name: getattr(sharding, name) for name in OPTION_OF.values() if getattr(sharding, name) != "ddp"}
    listed = [f"{kind} for {name}" for name, kind in kinds.items()]
    listed += ["float32 master weights"] * sharding.master_weights
    listed += [f"{' and '.join(sharding.offload)} offloaded to the CPU"] * bool(sharding.offload)
    return f", in shards ({', '.join(listed)})" if kinds else ""


def _peers(options: PipelineOptions) -> str:
    """How many processes a rank consists of, and which of them the table is about."""
    sizes = {name: size for name, size in asdict(options.parallel).items() if size > 1}
    listed = ", ".join(f"{name} parallel size {size}" for name, size in sizes.items())
    return f", each of {options.parallel.peers} processes ({listed}), of one of which the table tells" if sizes else ""


def _assumptions(run: RunReader, microbatch: TypicalMicrobatch, microbatches: int, dp: int, size: int) -> str:
    """The caption of the table: the assumptions of the estimates."""
    sample_tokens = run.strategy.options.sample_tokens
    seen = (
        f"over samples of {sample_tokens} tokens" if sample_tokens else "left out (the strategy has no sample_tokens)"
    )
    media = f", {microbatch.media_rows} of them of media, {microbatch.item_rows} each" if microbatch.media_rows else ""
    targets = f", {microbatch.targets} targets of {list(microbatch.target_shape)}" if microbatch.targets else ""
    divided = _peers(run.strategy.options)
    return (
        f"{dp} pipeline{'s' * (dp > 1)} of {size} ranks{divided}; "
        f"{microbatches} microbatches of {microbatch.tokens} tokens{media}{targets}.\n"
        f"precision {run.config['trainer']['precision'] or '32-true'}; static: weights, gradients and AdamW's moments"
        f"{_shards(run.strategy.options)}; "
        "peaks: inputs and outputs of matrices,\nwith fused attention; not counted: buffers of messages and of the "
        f"allocator, and codecs at work. Attention {seen}."
    )
