"""The command `bigmac plan --config`: shows what each rank of a run will need, and the plan of its first batch.

It builds the model on the meta device, the strategy and the data. It starts no processes and reads no weights and no
contents of media. If the processor of a MultimodalDataModule is there, its tokens are checked against the model, as in
a run.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.commands.answer import PROBLEMS, answer, text_of
from bigmac_lightning.commands.config import ConfigReader
from bigmac_lightning.commands.plan import OUTPUT, OUTPUTS, write_plan
from bigmac_lightning.commands.request import check_suffix
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.ranks import Precision
from bigmac_lightning.estimates.step import StepEstimate
from bigmac_lightning.estimates.table import count_text, partition_table
from bigmac_lightning.runtime.mesh import mesh_shape
from bigmac_lightning.schedule.draw import TerminalTimeline, spans_of, table
from bigmac_lightning.schedule.measured_costs import MeanWork
from bigmac_lightning.training.first_batch import first_batch
from bigmac_lightning.training.known_costs import check_known, measured_at, scaling_text
from bigmac_lightning.training.options import DEFAULT_COSTS, OPTION_OF, PipelineOptions
from bigmac_lightning.training.stages import resolve_options, typical_microbatch
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

OF_FIRST_BATCH = (
    "this is the plan of the first batch, with which bigmac fit begins; each batch has a plan of its own, for the "
    "tokens, media and targets that it has"
)
OF_EQUAL = "this is the plan of a step whose microbatches are all alike, and not of the first batch, as"
TRAINER = ("overfit_batches", "limit_train_batches", "use_distributed_sampler", "num_nodes")
"""The Trainer's arguments that the first batch depends on, besides the number of processes."""


class NoFirstBatchError(Exception):
    """The first batch is not known; the text is the reason."""


class RunReader(ConfigReader):
    """Builds the model and the strategy of a config, and its data if it is asked to.

    Attributes:
        model: the model, on the meta device.
        strategy: the strategy of the run.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        optional: Any = int | None
        help = "microbatches of a step that are all alike; default: those of the first batch, for which data are read"
        parser.add_argument("--microbatches", type=optional, help=help)
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

    def data(self) -> pl.LightningDataModule:
        """The data of the run.

        Raises:
            NoFirstBatchError: they cannot be made, or the command's arguments say what a step has.
        """
        given = {f"microbatch.{name}": value for name, value in vars(self.config["microbatch"]).items()}
        given["microbatches"] = self.config["microbatches"]
        if options := [f"--{name}" for name, value in given.items() if value is not None]:
            raise NoFirstBatchError(f"{', '.join(options)} {'say' if len(options) > 1 else 'says'} what a step has")
        seed = self.config["seed_everything"]
        if seed is not False:
            seed_everything(None if seed is True else seed, workers=True, verbose=False)
        try:
            return self.parser.instantiate_classes(Namespace(data=self.config["data"]))["data"]
        except Exception as error:
            raise NoFirstBatchError(_reason_of(error)) from error

    def first_batch(self, data: pl.LightningDataModule, options: PipelineOptions, size: int, replicas: int) -> Batch:
        """The first batch of the data, for the first of so many pipelines of `size` ranks.

        Raises:
            NoFirstBatchError: the data have no batch that a training would run.
        """
        assert isinstance(self.model, PipelineModule)
        try:
            return first_batch(self.model, data, options.layout(size, 0), replicas, self.trainer_arguments)
        except Exception as error:
            raise NoFirstBatchError(_reason_of(error)) from error

    @property
    def precision(self) -> Precision:
        """The bytes of numbers."""
        trainer = self.config["trainer"]
        return Precision.of(trainer["precision"], self.strategy.float32_gradients, trainer["accumulate_grad_batches"])

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments that the first batch depends on."""
        known = self.config["trainer"]
        return {"devices": self.world_size // known["num_nodes"], **{name: known[name] for name in TRAINER}}

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
        if not isinstance(processor, str) or not (processor == "bytes" or Path(local_folder(processor)).is_dir()):
            return
        data = self.config["data"].clone()
        for name in ("train", "val", "test", "predict"):
            if self.of_data(name):
                data["init_args"][name] = []
        if self.of_data("mixture") is not None:
            data["init_args"]["mixture"]["weights"] = data["init_args"]["mixture"]["val_split"] = None
        self.parser.instantiate_classes(Namespace(data=data))["data"].check(self.model)

    def microbatches(self, size: int) -> int:
        """The number of microbatches by the command's arguments, the strategy's or the data's, or else by default."""
        given = self.config["microbatches"] or self.strategy.options.microbatches or self.of_data("microbatches")
        return given or 4 * size

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


class PlanReader(RunReader):
    """Reads what the command alone has, too."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        optional: Any = str | None
        parser.add_argument("--output", type=optional, help=OUTPUT)


def _reason_of(error: Exception) -> str:
    """An error in one line; those that no user is to blame for with the name of their class."""
    return text_of(error) if isinstance(error, PROBLEMS) else f"{type(error).__name__}: {text_of(error)}"


def _amounts(work: MeanWork) -> dict[str, Any]:
    """The microbatch that was measured."""
    amounts = {"tokens": work.tokens, "media_rows": work.rows, "targets": work.targets}
    amounts |= {"item_rows": work.rows / work.items} if work.items else {}
    amounts |= {"target_rows": work.target_rows / work.targets} if work.targets else {}
    shape = {"target_shape": work.target_shape} if work.targets else {}
    return {name: math.ceil(number) for name, number in amounts.items()} | shape


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return answer("plan", lambda: _show(PlanReader("plan", argv), Console()), further=[TypeError])


@dataclass(frozen=True)
class Estimated:
    """What is told of a run before it starts.

    Attributes:
        estimate: the estimate of a step.
        options, stages: those that the run will have.
        reason: why "auto" became what it is.
        microbatch, microbatches: what a mean microbatch holds, and their number in a step.
        replicas, size: the numbers of pipelines, and of the ranks of each.
        first: whether it is the first batch of the run's data.
    """

    estimate: StepEstimate
    options: PipelineOptions
    stages: list[range]
    reason: str
    microbatch: TypicalMicrobatch
    microbatches: int
    replicas: int
    size: int
    first: bool

    @property
    def seconds(self) -> float | None:
        """Seconds of a step, if its costs were measured."""
        known = self.options.known
        return None if known is None or not self.estimate.seconds else self.estimate.timeline.makespan + known.beside


def estimated(run: RunReader, data: pl.LightningDataModule | None = None) -> Estimated:
    """Estimate a step of a run.

    Args:
        data: the run's data, whose first batch is the step; ``None``: a step whose microbatches are all alike.

    Raises:
        ValueError: the run is not possible, or its costs were measured for another one.
        NoFirstBatchError: the data have no batch that a training would run.
    """
    module, strategy, microbatch = run.model, run.strategy, run.microbatch()
    assert isinstance(module, PipelineModule)
    dp, size = mesh_shape(run.world_size, *strategy.sizes, peers=strategy.options.parallel.peers)
    if refused := module.llm.why_not_parallel(strategy.options.parallel):
        raise ValueError(refused)
    if strategy.options.known is not None:
        file = str(strategy.options.schedule.costs_file)
        check_known(strategy.options.known, file, module, run.config["trainer"]["precision"])
    assumed = microbatch if data is None else typical_microbatch(module, data)
    options, stages, reason = resolve_options(module, strategy.options, size, assumed)
    batch = None if data is None else run.first_batch(data, options, size, dp)
    if batch is None:
        microbatches = run.microbatches(size)
    else:
        microbatch, microbatches = TypicalMicrobatch.mean(batch), len(batch)
    module.adapt()
    costs_given, known, measured = strategy.options.schedule.given_costs is not None, options.known, None
    if known is not None:
        work = known.work.with_amounts(microbatch.tokens, microbatch.media_rows, microbatch.targets)
        measured = measured_at(known, module, stages, options, work)
    at = (microbatch, microbatches, run.precision, not costs_given, dp, measured)
    estimate = StepEstimate(module, options, stages, size, *at, batch=batch)
    return Estimated(estimate, options, stages, reason, microbatch, microbatches, dp, size, batch is not None)


def _show(run: PlanReader, console: Console) -> None:
    check_suffix(run.config["output"], OUTPUTS)
    run.check_data()
    try:
        found, text = estimated(run, run.data()), OF_FIRST_BATCH
    except NoFirstBatchError as reason:
        found, text = estimated(run), f"{OF_EQUAL} {reason}"
    estimate = found.estimate
    if run.config["output"]:
        console.print(text, highlight=False, soft_wrap=True)
        write_plan(estimate.plan, estimate.timeline, run.config["output"], estimate.workload, None, console)
        return
    if found.reason:
        console.print(found.reason, highlight=False, soft_wrap=True)
    console.print(_components(run.model), highlight=False, soft_wrap=True)
    ranks = partition_table(estimate.ranks)
    ranks.caption = _assumptions(run, found)
    print_whole(console, ranks)
    console.print(_costs(run, found), highlight=False, soft_wrap=True)
    console.print(text, highlight=False, soft_wrap=True)
    print_whole(console, table(estimate.plan, estimate.timeline))
    console.print(TerminalTimeline(spans_of(estimate.plan, estimate.timeline)))


def _costs(run: RunReader, found: Estimated) -> str:
    """What the plan was made from."""
    estimate, options, known = found.estimate, found.options, found.options.known
    costs = ", ".join(f"{kind}: {cost:.4g}" for kind, cost in asdict(estimate.costs).items() if cost)
    if known is not None and estimate.seconds:
        scaling = scaling_text(known, found.stages, options.parallel)
        return (
            f"costs of the plan, in seconds, by {options.schedule.costs_file}, measured on {known.device}: "
            f"{{{costs}}}{scaling and f' ({scaling})'}\n"
            f"a step takes {found.seconds:.4g} s: {estimate.timeline.makespan:.4g} s by the plan, and "
            f"{known.beside:.4g} s for sums of gradients, the optimizer, and what is done before the first action"
        )
    if run.strategy.options.schedule.given_costs is not None:
        return f"costs of the plan, as the config says: {{{costs}}}"
    if known is not None:
        source = f"by the ratios of {options.schedule.costs_file}, which was measured with other parts trained"
    elif found.first and options.assumed == DEFAULT_COSTS:
        source = "guessed, as the data or the model do not say enough to estimate them"
    else:
        source = "estimated, in TFLOP"
    return f"costs of the plan, {source}: {{{costs}}}\n(a training goes on with the times that it has measured)"


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


def _assumptions(run: RunReader, found: Estimated) -> str:
    """The caption of the table: the assumptions of the estimates."""
    dp, mean = found.replicas, "on average " if found.first else ""
    sample_tokens = run.strategy.options.sample_tokens
    seen = (
        f"over samples of {sample_tokens} tokens" if sample_tokens else "left out (the strategy has no sample_tokens)"
    )
    divided = _peers(run.strategy.options)
    return (
        f"{dp} pipeline{'s' * (dp > 1)} of {found.size} ranks{divided}; "
        f"{found.microbatches} microbatches of {mean}{found.microbatch}.\n"
        f"precision {run.config['trainer']['precision'] or '32-true'}; static: weights, gradients and AdamW's moments"
        f"{_shards(run.strategy.options)}; "
        "peaks: inputs and outputs of matrices,\nwith fused attention; not counted: buffers of messages and of the "
        f"allocator, and codecs at work. Attention {seen}."
    )
