"""The command `bigmac profile`: it trains a config for a few steps and writes what its actions cost on this hardware.

It saves no checkpoints, validates nothing and logs nothing. As `fit`, it is run again for each further process.
"""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from bigmac_lightning.callbacks import PipelineMonitor, PreemptionCheckpoint, SampleImages, SampleReplies
from bigmac_lightning.commands.answer import PARSER, answer
from bigmac_lightning.commands.config import BigMacCLI, with_class
from bigmac_lightning.commands.plain_errors import plain_errors
from bigmac_lightning.commands.request import check_suffix
from bigmac_lightning.schedule.budget import size_text
from bigmac_lightning.schedule.measured_costs import SUFFIX, MeasuredCosts
from bigmac_lightning.schedule.rates import described
from bigmac_lightning.training.measuring import WARM_UP
from bigmac_lightning.training.profiling import Profiling
from bigmac_lightning.training.strategy import BigMacStrategy

LEFT_OUT = (
    *(Checkpoint, EarlyStopping, LearningRateMonitor, DeviceStatsMonitor),
    *(PipelineMonitor, SampleImages, SampleReplies, PreemptionCheckpoint),
)
"""Callbacks that save, stop, log or draw. Others may freeze weights, which changes what is measured, and stay."""


class ProfileCLI(BigMacCLI):
    """Makes a config's model, data and Trainer, for a few steps that are measured."""

    def __init__(self, arguments: Sequence[str]) -> None:
        parser = {**PARSER, "prog": "bigmac profile"}
        super().__init__(args=list(arguments), run=False, parser_kwargs=parser, save_config_callback=None)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name in ("ckpt_path", "weights_only"):  # arguments of fit, which a config saved by a run has
            parser.add_argument(f"--{name}", type=Any)
        steps = f"optimizer steps; the first {WARM_UP} batches are not timed"
        parser.add_argument("--steps", type=int, default=12, help=steps)
        parser.add_argument("--output", type=str, default="costs.json", help="the costs file to write")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(with_class(args))

    def before_instantiate_classes(self) -> None:
        check_suffix(self.config["output"], (SUFFIX,))
        if self.config["steps"] <= WARM_UP:
            raise ValueError(f"--steps is {self.config['steps']}; expected an integer of at least {WARM_UP + 1}")
        strategy = self.config["trainer"]["strategy"]
        if isinstance(strategy, Namespace) and isinstance(strategy.get("init_args.schedule"), Namespace):
            strategy["init_args.schedule.costs"] = None  # they are what is measured

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        given = self.config_init["trainer"]["callbacks"] or []
        callbacks = [one for one in (given if isinstance(given, list) else [given]) if not isinstance(one, LEFT_OUT)]
        self.profiling = Profiling()
        short: dict[str, Any] = {"max_steps": self.config["steps"], "max_epochs": -1, "max_time": None}
        short |= {"min_steps": None, "min_epochs": None, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        short |= {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "profiler": None}
        trainer = super().instantiate_trainer(**short, callbacks=[*callbacks, self.profiling], **kwargs)
        if not isinstance(trainer.strategy, BigMacStrategy):
            raise ValueError(f"trainer.strategy is {trainer.strategy!r}; only bigmac has actions to measure")
        return trainer


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code. Errors of the training end it as they end `fit`."""
    made = list[ProfileCLI]()
    if code := answer("profile", lambda: made.append(ProfileCLI(argv)), further=[TypeError]):
        return code
    run = made[0]
    run.check("profile")
    with plain_errors("profile"):
        run.trainer.fit(run.model, run.datamodule)
    found = run.profiling.found
    if found is None:
        raise ValueError("the training ended before its costs were measured: it has no batches")
    if run.trainer.is_global_zero:
        found.save(run.config["output"])
        _show(found, run.config["output"], Console())
    return 0


def _show(found: MeasuredCosts, output: str, console: Console) -> None:
    times = {"message": found.message, "sums of gradients": found.reduction, "optimizer": found.optimizer}
    times |= {"rest of a step": found.outside}
    sizes = {"encoder unit": found.encoder_unit, "LLM microbatch": found.llm_microbatch}
    sizes |= {"generator's targets of a microbatch": found.generator_unit, "peak": found.peak}
    lines = [f"{output}: measured on {found.device}", f"  {described(found.rates)}"]
    lines += ["  " + ", ".join(f"{name} {1e3 * known:.3g} ms" for name, known in times.items() if known is not None)]
    lines += ["  " + ", ".join(f"{name} {size_text(known)}" for name, known in sizes.items() if known is not None)]
    lines += [f"  left out: {text}" for text in found.left_out]
    console.print("\n".join(line for line in lines if line.strip()), highlight=False, soft_wrap=True)
