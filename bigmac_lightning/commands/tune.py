"""The command `bigmac tune`: it searches the layout and the schedule of a run that take the least time and fit into
memory, and writes them into a config. The model is built without weights. Of the data, the first batch is made, unless
the config says how many tokens a microbatch has."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bigmac_lightning.commands.answer import answer
from bigmac_lightning.commands.plan_config import NoFirstBatchError, RunReader
from bigmac_lightning.commands.request import check_suffix
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.estimates.costs import can_be_estimated
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.runtime.mesh import mesh_shape
from bigmac_lightning.schedule.budget import parse_size, size_text
from bigmac_lightning.training.known_costs import check_known
from bigmac_lightning.training.options import ShardingOptions
from bigmac_lightning.tuning.communication import Device
from bigmac_lightning.tuning.evaluating import Evaluator, Problem, Tried, chosen_of
from bigmac_lightning.tuning.search import Found, search
from bigmac_lightning.tuning.space import SHARDINGS, TIMES_OF_TOKENS, Space
from bigmac_lightning.whole_tables import print_whole

SHOWN = 5
PER_NODE = 8
"""Processes of a usual node, which has so many GPUs."""

OWN = ("ranks", "memory", "costs", "output", "seconds", "device", "microbatches", "microbatch")
"""Arguments of the command, which `fit` does not have."""

LLM_CHECKPOINTING = "model.init_args.llm.init_args.gradient_checkpointing"
STRATEGY = "bigmac_lightning.BigMacStrategy"


class TuneReader(RunReader):
    """Builds the model and the strategy of a config, and reads what is searched."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        text: Any = str | None
        number: Any = int | None
        parser.add_argument("--ranks", type=number, help="number of processes; default: the config's")
        parser.add_argument("--memory", type=str, default="80GiB", help="memory of each of them, less what others use")
        parser.add_argument("--costs", type=text, help="a file of `bigmac profile`; default: costs are estimated")
        parser.add_argument("--output", type=str, default="tuned.yaml", help="the config to write")
        limit = "after so long the search ends, if it has found anything"
        parser.add_argument("--seconds", type=float, default=60.0, help=limit)
        tflops = "TFLOP that a process computes in a second, in a training; for estimated costs"
        parser.add_argument("--device.tflops", type=float, default=Device.tflops, help=tflops)
        sent = "bytes that it sends in a second; default: as messages were measured, or 50GB"
        parser.add_argument("--device.bandwidth", type=text, help=sent)

    def instantiate_classes(self) -> None:
        check_suffix(self.config["output"], (".yaml", ".yml"))
        if self.config["costs"] is not None:
            self.set_strategy({"schedule.costs": self.config["costs"]})
        super().instantiate_classes()

    def set_strategy(self, values: dict[str, Any]) -> None:
        """Set arguments of the strategy in the config."""
        strategy = self.config["trainer"]["strategy"]
        if not isinstance(strategy, Namespace):
            strategy = Namespace(class_path=STRATEGY, init_args=Namespace())
        for name, value in values.items():
            group, _, field = name.partition(".")
            if field and not isinstance(strategy.init_args.get(group), Namespace):
                strategy.init_args[group] = Namespace()
            strategy.init_args[name] = value
        self.config["trainer"]["strategy"] = strategy


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return answer("tune", lambda: _tune(TuneReader("tune", argv), Console()), further=[TypeError])


def _tune(run: TuneReader, console: Console) -> None:
    (problem, source), space = _problem(run), _space(run)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("layouts")

        def show(number: int, total: int, found: Found) -> None:
            best = f", best {found.best[0].seconds:.4g} s" if found.best else ""
            text = f"layouts ({found.simulated} plans simulated{best})"
            bar.update(task, completed=number, total=total, description=text)

        found = search(Evaluator(problem), space, show, run.config["seconds"])
    if not found.best:
        reasons = "".join(f"\n  {number} layouts: {reason}" for reason, number in found.refused.most_common())
        raise ValueError(f"no choice fits {space.processes} ranks of {size_text(problem.memory)}:{reasons}")
    print_whole(console, _table(found, problem, source, run.config["trainer"]["accelerator"]))
    if found.left:
        text = f"{found.left} layouts, which are slower by a rough guess, were not looked at; --seconds gives more time"
        console.print(text, highlight=False, soft_wrap=True)
    _write(run, found.best[0], problem.microbatch)
    console.print(f"{run.config['output']}: the first of them", highlight=False, soft_wrap=True)


def _step(run: TuneReader, replicas: int, size: int) -> tuple[TypicalMicrobatch, int, str]:
    """What a microbatch of the config holds, how many of them a pipeline has in a step, and who says so."""
    if run.of_data("token_budget"):
        return run.microbatch(), run.microbatches(size), "the data's token_budget"
    try:
        batch = run.first_batch(run.data(), run.strategy.options, size, replicas)
    except NoFirstBatchError as reason:
        return run.microbatch(), run.microbatches(size), f"assumption, as {reason}"
    return TypicalMicrobatch.mean(batch), len(batch), "the first batch"


def _problem(run: TuneReader) -> tuple[Problem, str]:
    """The problem, and who says what a microbatch holds."""
    module, options = run.model, run.strategy.options
    assert isinstance(module, PipelineModule)
    replicas, size = mesh_shape(run.world_size, *run.strategy.sizes, peers=options.parallel.peers)
    microbatch, per_pipeline, source = _step(run, replicas, size)
    known = options.known
    if known is not None:
        check_known(known, str(run.config["costs"]), module, run.config["trainer"]["precision"])
    elif not can_be_estimated(module, microbatch):
        raise ValueError(
            "a component of the model does not say its cost in multiplications (`LanguageModel.costs`, `forward_cost`)"
            ", so times cannot be estimated: measure them by `bigmac profile`, and give their file as --costs"
        )
    assert module.trained_layers  # found before adapters are added
    module.adapt()
    problem = Problem(
        module,
        microbatch,
        replicas * per_pipeline * microbatch.tokens,
        options.sample_tokens,
        run.precision,
        float(parse_size(run.config["memory"], "memory")),
        _device(run, module),
        replace(options.schedule, costs=None, virtual_stages=None, backbone="1f1b", group_size=None),
        known,
    )
    return problem, source


def _device(run: TuneReader, module: PipelineModule) -> Device:
    given, known = run.config["device"], run.strategy.options.known
    if given["bandwidth"] is not None:
        return Device(given["tflops"], float(parse_size(given["bandwidth"], "device.bandwidth")))
    if known is None or not known.message:
        return Device(given["tflops"])
    number = run.precision.activations or (module.llm.dtype.itemsize if module.llm.dtype else 4)
    sent = known.work.tokens / known.context_parallel_size * module.llm.width * number
    return Device(given["tflops"], sent / known.message)


def _space(run: TuneReader) -> Space:
    base, llm = run.strategy.options.sharding, run.model.llm
    ranks = run.world_size if run.config["ranks"] is None else run.config["ranks"]
    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}; expected an integer of at least 1")
    shardings = list[ShardingOptions]()
    for one in SHARDINGS:
        try:
            shardings.append(replace(one, master_weights=base.master_weights, offload=base.offload))
        except ValueError:  # what is offloaded, or has master weights, lies in shards
            continue
    own = run.config.get(LLM_CHECKPOINTING) is not None
    return Space(
        ranks,
        experts=not llm.why_not_parallel(ParallelSizes(2, 1, 2)) if ranks > 1 else False,
        tokens=TIMES_OF_TOKENS if run.of_data("token_budget") else (1.0,),
        checkpointing=(False, True) if own else (llm.gradient_checkpointing,),
        shardings=shardings,
    )


def _table(found: Found, problem: Problem, microbatch_source: str, accelerator: str) -> Table:
    table = Table(title="the fastest choices", title_justify="left", caption_justify="left")
    headings = ("", "ranks", "microbatches", "in shards: encoders, generators, stages", "schedule", "seconds per step")
    for heading in (*headings, "memory", "why"):
        table.add_column(heading, overflow="fold")
    for number, one in enumerate(found.best[:SHOWN], 1):
        layout, sharding = one.layout, one.layout.sharding
        tokens = round(problem.microbatch.tokens * layout.tokens)
        again = ", layers checkpointed" * layout.checkpointing
        table.add_row(
            str(number),
            str(layout),
            f"{one.microbatches} of {tokens} tokens{again}",
            f"{sharding.encoders}, {sharding.generators}, {sharding.stages}",
            f"{schedule_text(one)}; {layout.partition} stages",
            f"{one.seconds:.4g} ({one.seconds / found.best[0].seconds:.3f})",
            size_text(one.memory),
            one.reason,
        )
    source = "measured" if problem.known else f"estimated, with {problem.device.tflops:g} TFLOP/s"
    lines = [
        f"Times are {source}; {size_text(problem.device.bandwidth)}/s are sent. {found.simulated} plans simulated.",
        f"A microbatch of the config has {problem.microbatch} (by {microbatch_source}).",
    ]
    if accelerator == "cpu" and not problem.known and problem.device.tflops == Device.tflops:
        lines.append(
            "The config trains on the CPU, which is slower: give --costs of bigmac profile, or --device.tflops."
        )
    lines += [f"refused: {number} layouts: {reason}" for reason, number in found.refused.most_common(SHOWN)]
    table.caption = "\n".join(lines)
    return table


def schedule_text(one: Tried) -> str:
    """The schedule of a choice, in words."""
    chosen = one.schedule
    if one.layout.size == 1:
        return "one stage"
    stages = f" with {chosen.virtual_stages} stages per rank" if chosen.virtual_stages not in (None, 1) else ""
    group = f", group_size {chosen.group_size}" if chosen.group_size else ""
    pieces = f", {chosen.pieces} pieces" if chosen.pieces > 1 else ""
    return f"{chosen.policy} on {chosen.backbone}{stages}{group}{pieces}"


def _nodes(total: int, before: int, nodes: int) -> int:
    """How many nodes so many processes are on, which were on `nodes` when there were `before`."""
    for number in (nodes, -(-total // max(before // nodes, PER_NODE))):
        if total % number == 0 and total // number <= max(before // nodes, PER_NODE):
            return number
    return 1


def _write(run: TuneReader, best: Tried, microbatch: TypicalMicrobatch) -> None:
    """Write the config with what was chosen."""
    config, layout, trainer = run.config, best.layout, run.config["trainer"]
    values: dict[str, Any] = {
        "pipeline_parallel_size": layout.size,
        "data_parallel_size": layout.replicas,
        **{f"{name}_parallel_size": size for name, size in asdict(layout.parallel).items()},
        "microbatches": best.microbatches,
        "stages.partition": layout.partition,
        "stages.factors": None if best.schedule.own_ranks else "auto",
        "stages.sample_tokens": run.strategy.options.sample_tokens,
        **{f"sharding.{name}": value for name, value in asdict(layout.sharding).items()},
        **{f"schedule.{name}": value for name, value in chosen_of(best.schedule).items()},
    }
    values["sharding.offload"] = list(layout.sharding.offload)
    was = mesh_shape(run.world_size, *run.strategy.sizes, peers=run.strategy.options.parallel.peers)[0]
    run.set_strategy(values)
    total = layout.replicas * layout.size * layout.parallel.peers
    trainer["num_nodes"] = _nodes(total, run.world_size, trainer["num_nodes"])
    trainer["devices"] = total // trainer["num_nodes"]
    if config.get(LLM_CHECKPOINTING) is not None:
        config[LLM_CHECKPOINTING] = layout.checkpointing
    if run.of_data("token_budget"):
        config["data.init_args.token_budget"] = round(microbatch.tokens * layout.tokens)
    elif size := run.of_data("batch_size"):
        config["data.init_args.batch_size"] = math.ceil(size * was / layout.replicas)
    kept = config.clone()
    for name in OWN:
        kept.pop(name, None)
    with open(run.config["output"], "w", encoding="utf-8") as file:
        file.write(run.parser.dump(kept, skip_validation=True, skip_none=False))
