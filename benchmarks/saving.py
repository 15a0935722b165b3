"""What saving every five steps costs a run: the digits of `configs/digits.yaml` on two CPU processes.

Blocks of five steps take turns: without a save, with one in the background, and with one at once, so that other
programs on the machine slow all of them alike. A block with a save in the background ends when the save is whole. The
time of the processors tells what a save costs where all of them are busy; the time of a clock, which other programs
disturb, also has what ranks wait for each other.

    python -m benchmarks.saving [--blocks 20]
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table

BLOCK = 5
KINDS = ("none", "background", "at once")
CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"


class SavingBlocks(pl.Callback):
    """Saves at the start of a block as its turn is, and prints the seconds that blocks of each kind took."""

    def __init__(self, folder: str, blocks: int) -> None:
        self.folder, self.blocks = Path(folder), blocks
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.stopped: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.cpu: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self._start = self._cpu_start = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        block, within = divmod(trainer.global_step, BLOCK)
        if within:
            return
        strategy: Any = trainer.strategy
        strategy._background.wait()
        now, cpu = time.perf_counter(), time.process_time()
        if block > len(KINDS):  # the first of each kind warms up
            self.seconds[KINDS[(block - 1) % len(KINDS)]].append(now - self._start)
            self.cpu[KINDS[(block - 1) % len(KINDS)]].append(cpu - self._cpu_start)
        self._start, self._cpu_start, kind = now, cpu, KINDS[block % len(KINDS)]
        strategy._async_save = kind == "background"
        if kind != "none":
            trainer.save_checkpoint(self.folder / "run.ckpt", weights_only=False)
            self.stopped[kind].append(time.perf_counter() - now)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        everyone: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everyone, self.cpu)
        if not trainer.is_global_zero:
            return
        cpu: dict[str, list[float]] = {
            k: [sum(blocks) for blocks in zip(*(of[k] for of in everyone), strict=True)] for k in KINDS
        }
        columns = ("s per 5 steps", "against none", "CPU s of all ranks", "against none", "s until training goes on")
        table = Table("save every 5 steps", *columns)
        for kind in KINDS:
            stopped = f"{statistics.median(self.stopped[kind]):.3f}" if self.stopped[kind] else ""
            table.add_row(kind, *_against_none(self.seconds, kind), *_against_none(cpu, kind), stopped)
        size = sum(file.stat().st_size for file in (self.folder / "run.ckpt").iterdir())
        Console().print(
            table,
            f"{size / 1e6:.1f} MB a checkpoint; medians; in brackets: the median of ratios of neighbours, "
            "with its 95% interval (bootstrap)",
        )


def _against_none(found: dict[str, list[float]], kind: str) -> tuple[str, str]:
    ratios = [mine / none for mine, none in zip(found[kind], found["none"], strict=False)]
    median = statistics.median(found[kind])
    more = median / statistics.median(found["none"]) - 1
    draw = random.Random(0)
    again = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) - 1 for _ in range(2000))
    by_neighbours = f"{statistics.median(ratios) - 1:+.1%}, {again[50]:+.1%} to {again[-51]:+.1%}"
    return f"{median:.3f}", f"{more:+.1%} ({by_neighbours})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each kind")
    blocks = parser.parse_args().blocks
    with tempfile.TemporaryDirectory() as folder:
        config = yaml.safe_load(CONFIG.read_text())
        callback: dict[str, Any] = {"class_path": f"benchmarks.saving.{SavingBlocks.__name__}"}
        callback["init_args"] = {"folder": folder, "blocks": blocks}
        config["trainer"] |= {
            "callbacks": [callback],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "limit_val_batches": 0,
            "max_epochs": -1,
            "max_steps": (blocks + 1) * len(KINDS) * BLOCK + 1,
            "default_root_dir": folder,
        }
        config["trainer"]["strategy"]["init_args"]["async_save"] = True
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        subprocess.run([sys.executable, "-m", "bigmac_lightning.cli", "fit", "--config", str(path)], check=True)


if __name__ == "__main__":
    main()
