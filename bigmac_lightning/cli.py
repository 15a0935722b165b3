"""The command `bigmac`: LightningCLI's fit, validate, test and predict, `plan` and `compare`, which need no model, and
`export`."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.table import Table

from bigmac_lightning import compare_command, export_command, plan_command
from bigmac_lightning.module import PipelineModule


class BigMacCLI(LightningCLI):
    """LightningCLI for PipelineModules, with a summary after fit."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            PipelineModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            **kwargs,
        )

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            Console().print(summary(self.trainer))


def summary(trainer: pl.Trainer) -> Table:
    """What a finished run leaves: its last validation metrics and where its files are."""
    table = Table(title="done", show_header=False, title_style="bold")
    for name, value in sorted(trainer.callback_metrics.items()):
        if name.startswith("val"):
            table.add_row(name, f"{float(value):.4f}")
    for logger in trainer.loggers:
        if logger.log_dir is not None:
            table.add_row("log", str(logger.log_dir))
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best:
        table.add_row("best checkpoint", _shown(Path(best)))
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for callback in callbacks:
        for path in getattr(callback, "artifacts", []):
            table.add_row(path.stem, _shown(path))
    return table


def _shown(path: Path) -> str:
    """Relative to where the user is, if below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["plan"]:
        sys.exit(plan_command.main(sys.argv[2:]))
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare_command.main(sys.argv[2:]))
    if sys.argv[1:2] == ["export"]:
        sys.exit(export_command.main(sys.argv[2:]))
    BigMacCLI()


if __name__ == "__main__":
    main()
