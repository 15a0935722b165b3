"""LightningCLI for PipelineModules, which runs `bigmac fit`, `validate`, `test` and `predict`."""

import os
import pickle
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from bigmac_lightning.checkpoints.remote import Place, at
from bigmac_lightning.commands.answer import PARSER, Suggesting, answer, text_of
from bigmac_lightning.commands.plain_errors import plain_errors
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.datamodules.base import ParallelDataModule  # pyright: ignore[reportMissingImports]
from bigmac_lightning.training.strategy import BigMacStrategy
from bigmac_lightning.whole_tables import print_whole

CLASS = f"bigmac_lightning.{BigMacStrategy.__name__}"


class ConfigParser(Suggesting, LightningArgumentParser):
    """The parser of commands that read a config."""


class BigMacCLI(LightningCLI):
    """LightningCLI for PipelineModules, with a summary after fit."""

    def __init__(self, **kwargs: Any) -> None:
        own = {name: dict(PARSER) for name in self.subcommands()}
        kwargs = {"parser_kwargs": {**PARSER, **own}, "parser_class": ConfigParser, **kwargs}
        super().__init__(
            PipelineModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the number of nodes be the one that torchrun has found, which may change when it starts a run again."""
        if dist.is_available() and dist.is_torchelastic_launched():
            parser.set_defaults({"trainer.num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1))})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """An error ends with the key, its value and what is expected, and not with the list of all options."""
        given = with_class(args if isinstance(args, list) else sys.argv[1:])
        command = next((word for word in given if word in self.subcommands()), "")

        def parse() -> None:
            if args is None:
                self.config = parser.parse_args(given)
            else:
                super(BigMacCLI, self).parse_arguments(parser, given if isinstance(args, list) else args)

        if code := answer(command, parse, [TypeError]):
            sys.exit(code)

    def instantiate_classes(self) -> None:
        """An argument that a class refuses is named in the same way. Errors of user code keep their traceback."""
        if self.subcommand is None:  # of a command that answers errors itself
            return super().instantiate_classes()
        self._check_devices(self.subcommand)
        try:
            with plain_errors(self.subcommand):
                super().instantiate_classes()
        except ValueError as error:
            if "Union subtypes" not in str(error):
                raise
            print(f"bigmac {self.subcommand}: error: {text_of(error)}", file=sys.stderr)
            sys.exit(2)

    def _check_devices(self, command: str) -> None:
        """Devices of which torchrun has started another number end the command, in one line of one process."""
        trainer = self.config[command].trainer
        started, devices = int(os.environ.get("LOCAL_WORLD_SIZE", 0)), trainer.devices
        options = getattr(trainer.strategy, "init_args", None) or {}
        wanted = devices * options.get("ranks_per_device", 1) if isinstance(devices, int) and devices > 0 else started
        if dist.is_available() and dist.is_torchelastic_launched() and wanted != started:
            if os.environ.get("RANK") == "0":
                print(
                    f"bigmac {command}: error: torchrun starts {started} on each node, and trainer.devices is {wanted}"
                    f": give torchrun --nproc-per-node {wanted}, or bigmac --trainer.devices {started}",
                    file=sys.stderr,
                )
            sys.exit(2)

    def _parse_ckpt_path(self) -> None:
        """Take arguments of the model from a checkpoint, if they can be read. What is wrong with it is said later."""
        with suppress(pickle.UnpicklingError, OSError, RuntimeError, EOFError):
            super()._parse_ckpt_path()

    def _run_subcommand(self, subcommand: str) -> None:
        self.check(subcommand)
        with plain_errors(subcommand):
            super()._run_subcommand(subcommand)

    def check(self, command: str) -> None:
        """Sizes that do not go with the number of processes, and data that do not go with the model, end in the same
        way. They are found before a process starts others; those that torchrun has started find them alike, and the
        first one says it."""
        strategy, module = self.trainer.strategy, self.model
        if not isinstance(module, PipelineModule):
            return
        try:
            if isinstance(strategy, BigMacStrategy):
                strategy.mesh_shape(module)
            if isinstance(self.datamodule, ParallelDataModule):
                self.datamodule.check(module)
        except ValueError as error:
            if self.trainer.global_rank == 0:
                print(f"bigmac {command}: error: {text_of(error)}", file=sys.stderr)
            sys.exit(2)

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print_whole(Console(), summary(self.trainer))


def with_class(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line, with the class of the strategy in place of its name if options of it follow.
    jsonargparse knows options of classes only."""
    given, option = list(arguments), "--trainer.strategy"
    if any(argument.startswith(f"{option}.") for argument in given):
        for i, argument in enumerate(given):
            if argument == f"{option}={BigMacStrategy.strategy_name}":
                given[i] = f"{option}={CLASS}"
            elif argument == BigMacStrategy.strategy_name and i and given[i - 1] == option:
                given[i] = CLASS
    return given


class ConfigReader(BigMacCLI):
    """Reads the config of a run without running it. Derived classes choose what is instantiated.

    Args:
        command: name of the command, for error messages.
        arguments: arguments of the command line.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        parser = {**PARSER, "prog": f"bigmac {command}"}
        super().__init__(args=list(arguments), run=False, parser_kwargs=parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("ckpt_path", "weights_only"):  # arguments of fit, which a config saved by a run has
            parser.add_argument(f"--{name}", type=Any)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(with_class(args))

    def _set_seed(self) -> None:
        """Seed nothing, as no random numbers are drawn."""

    def _add_instantiators(self) -> None:
        """Record no arguments, as nothing is saved."""


def summary(trainer: pl.Trainer) -> Table:
    """A table of a finished run's last validation metrics and of its files."""
    table = Table(title="done", show_header=False, title_style="bold")
    for name, value in sorted(trainer.callback_metrics.items()):
        if name.startswith("val"):
            table.add_row(name, f"{float(value):.4f}")
    for logger in trainer.loggers:
        if logger.log_dir is not None:
            table.add_row("log", str(logger.log_dir))
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best:
        table.add_row("best checkpoint", _shown(at(best)))
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        for path in getattr(callback, "artifacts", []):
            table.add_row(path.stem, _shown(path))
    return table


def _shown(path: Place) -> str:
    """The path relative to the current folder, if it is inside; else the absolute path."""
    path = path.absolute()
    if isinstance(path, Path) and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path)
