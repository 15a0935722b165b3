"""How long a step takes and how many bytes of activations it keeps, as told before a run and as measured in it.

    python -m benchmarks.predictions

`bigmac profile` measures a config for a few steps, and `bigmac plan --config` plans with that file; then the config is
trained with it. A step is what plans say, and what is done beside the plan, as the file says. At last each plan is
simulated with the times that its actions have really taken: what is then missing is the plans' fault, and not that of
times that differ from those that were measured before. Two
processes on the CPU; the model of "100M" has 100 million weights and the data of the digits.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table

from bigmac_lightning.commands.plan_config import RunReader, estimated
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.schedule.measured_costs import MeasuredCosts
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.simulate import simulate

CONFIGS = Path(__file__).parents[1] / "configs"
COUNTED = 3
"""Batches in which bytes are counted, which takes time; and then as many that are not timed."""
LARGE: dict[str, Any] = {
    "llm": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"num_key_value_heads": 4, "head_dim": 64},
    "encoder": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6},
    "generator": {"num_layers": 2, "num_attention_heads": 6, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]},
}


class Watch(pl.Callback):
    """Writes the seconds of steps, what their plans said, and the bytes of activations at the peak of each rank."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.starts, self.planned, self.peak = list[float](), list[float](), 0
        self.done: list[tuple[Plan, float, float, dict[str, float]]] = []
        self._tracker: MemoryTracker | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        runner: Any = trainer.strategy.runner  # pyright: ignore[reportAttributeAccessIssue]
        if batch_idx == 0:
            whole = runner.sharding.whole()
            self._tracker = runner.executor.memory = MemoryTracker([*pl_module.parameters(), *whole])
            self._tracker.recording = True
        if batch_idx == COUNTED:
            self.peak, runner.executor.memory = self._most(), None
        if batch_idx >= 2 * COUNTED:
            self.starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        runner: Any = trainer.strategy.runner  # pyright: ignore[reportAttributeAccessIssue]
        planned, timing = runner.last_planned, runner.executor.timing
        if not self.starts or timing is None:
            return
        if planned.seconds is not None:
            self.planned.append(planned.seconds)
        spans = timing.spans()
        begin, end = (timing.origin_seconds + at for at in (spans[0].start, spans[-1].end))
        self.done.append((planned.plan, begin, end, {str(action): took for action, took in timing.durations()}))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        everyone: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everyone, (self.peak, self.done))
        if trainer.is_global_zero:
            seconds = [after - before for before, after in zip(self.starts, self.starts[1:], strict=False)]
            peaks, done = zip(*everyone, strict=True)
            replayed = [_replayed(batch) for batch in zip(*done, strict=True)]
            found = {"seconds": seconds, "planned": self.planned, "peaks": peaks, "replayed": replayed}
            self.path.write_text(json.dumps(found))

    def _most(self) -> int:
        """The most bytes that were alive at one time, of all components together."""
        assert self._tracker is not None
        live, most = dict[str, int](), 0
        for _, name, size in self._tracker.curve:
            live[name] = size
            most = max(most, sum(live.values()))
        return most


def _replayed(ranks: Sequence[tuple[Plan, float, float, dict[str, float]]]) -> float:
    """The simulation of a plan with the times that its actions have taken, relative to the time it has taken."""
    plans, begins, ends, took = zip(*ranks, strict=True)
    plan: Plan = plans[0]
    durations = [[took[rank][str(action)] for action in actions] for rank, actions in enumerate(plan.ranks)]
    return simulate(plan, durations=durations).makespan / (max(ends) - min(begins))


def large() -> dict[str, Any]:
    """The config of the digits with a model of 100 million weights."""
    config = yaml.safe_load((CONFIGS / "digits.yaml").read_text())
    parts, width = config["model"]["init_args"], LARGE["llm"]["hidden_size"]
    parts["llm"]["init_args"]["config"] |= LARGE["llm"]
    for kind, name in (("encoders", "encoder"), ("generators", "generator")):
        arguments = parts[kind]["image"]["init_args"]
        arguments["width"] = width
        arguments["config"] |= LARGE[name]
    parts["learning_rate"] = 1e-4
    config["data"]["init_args"] |= {"batch_size": 32, "microbatches": 8}
    return config


def measured(name: str, steps: int) -> dict[str, float]:
    """The seconds and bytes of a config, as measured, and what was told of them, as parts of that."""
    config = large() if name == "100M" else yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    with tempfile.TemporaryDirectory() as folder:
        path, costs, found = (Path(folder) / file for file in ("config.yaml", "costs.json", "found.json"))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": -1}
        quiet |= {"callbacks": None, "limit_val_batches": 0, "default_root_dir": folder}
        config["trainer"] |= quiet | {"max_steps": steps}
        path.write_text(yaml.safe_dump(config))
        _bigmac("profile", "--config", str(path), "--steps", str(steps), "--output", str(costs))
        config["trainer"]["callbacks"] = [{"class_path": f"benchmarks.predictions.{Watch.__name__}"}]
        config["trainer"]["callbacks"][0]["init_args"] = {"path": str(found)}
        config["trainer"]["strategy"]["init_args"]["schedule"] = {"costs": str(costs)}
        path.write_text(yaml.safe_dump(config))
        _bigmac("fit", "--config", str(path))
        known, seen = MeasuredCosts.load(costs), json.loads(found.read_text())
        run = estimated(RunReader("plan", ["--config", str(path)]))
    assert run.seconds is not None
    step, peak = statistics.median(seen["seconds"]), max(seen["peaks"])
    return {
        "step, s": step,
        "told / step": run.seconds / step,
        "plans / step": (statistics.median(seen["planned"]) + known.beside) / step,
        "replayed": statistics.median(seen["replayed"]),
        "peak activations, MB": peak / 1e6,
        "told / peak": max(_saved(rank.activations) for rank in run.estimate.ranks) / peak,
    }


def _saved(activations: dict[str, float]) -> float:
    """The bytes of what autograd saves. The logits are not: they are made and used within one function."""
    return sum(size for name, size in activations.items() if name != "logits")


def _bigmac(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "bigmac_lightning.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["digits", "easy_vqa", "100M"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a profile and a run, as machines change speed")
    arguments = parser.parse_args()
    table = Table(title="told before the run (by mean microbatches, and by each batch's own plan), and measured")
    table.caption = f"medians of {arguments.repeats} pairs of a profile and a run (least to most)"
    for name in arguments.configs:
        rows = [measured(name, arguments.steps) for _ in range(arguments.repeats)]
        if not table.columns:
            for column in ("run", *rows[0]):
                table.add_column(column, justify="right")
        table.add_row(name, *(_spread([row[column] for row in rows]) for column in rows[0]))
    Console(width=120).print(table)


def _spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"


if __name__ == "__main__":
    main()
