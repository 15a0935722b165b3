"""Does a step of `nested` take longer if encoder and generator lie in shards? Layers that sleep as devices compute,
with real weights, real messages and real collectives, over gloo.

    python -m benchmarks.sharded_makespan
"""

import argparse
import statistics
import time
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.ranks import awake_cores, prompt_wake_ups, run_ranks
from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of

WIDTH, BLOCKS = 64, 4


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()  # FSDP2 warns of views

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        time.sleep(2 * ctx.seconds)
        return gradient, None


class SleepingBlock(nn.Module):
    """Sleeps for each item, and multiplies by a real weight."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(WIDTH, WIDTH), seconds

    def forward(self, x: Tensor, items: int) -> Tensor:
        return _Sleep.apply(x + self.linear(x) * 0.1, self.seconds * items)


class SleepingEncoder(Encoder):
    width = WIDTH

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.entrance = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(SleepingBlock(seconds / BLOCKS) for _ in range(BLOCKS))

    def forward(self, pixels: list[Tensor]) -> Tensor:
        x = self.entrance(torch.cat(pixels))
        for block in self.blocks:
            x = block(x, len(pixels))
        return x

    def smallest(self) -> Tensor:
        return torch.zeros(1, WIDTH)


class SleepingGenerator(Generator):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SleepingBlock(seconds / BLOCKS) for _ in range(BLOCKS))

    def forward(self, conditions: list[Tensor], items: list[TargetItem]) -> Tensor:
        x = torch.cat(conditions)
        for block in self.blocks:
            x = block(x, len(items))
        return x.square().mean() * len(items)

    def sample(self, conditions: list[Tensor], items: list[TargetItem]) -> list[Tensor]:
        raise NotImplementedError

    def smallest(self) -> tuple[Tensor, TargetItem]:
        return torch.zeros(1, WIDTH), TargetItem("drawing", 1, (1,), data=torch.zeros(1))


class SleepingLLM(LanguageModel):
    width, tied = WIDTH, {}

    def __init__(self, layers: int, seconds: float) -> None:
        super().__init__()
        self.num_layers, self.seconds = layers, seconds

    def materialize(self, layers: Collection[int], embedding: bool, head: bool, peers: Any = None) -> None:
        self.layers = nn.ModuleDict({str(k): SleepingBlock(self.seconds) for k in layers})
        self.embedding, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.embedding(inputs["input_ids"])

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        for k in layers:
            h_BSD = self.layers[str(k)](h_BSD, 1)
        return h_BSD

    def logits(self, h_LD: Tensor) -> Tensor:
        return self.head(h_LD)


def batch(microbatches: int, layout: PipelineLayout) -> Batch:
    """Microbatches with one media item and one target each."""
    made = [
        Microbatch(
            {"input_ids": torch.zeros(1, 16, dtype=torch.long)},
            label_positions=torch.arange(8),
            labels=torch.zeros(8, dtype=torch.long),
            media=[MediaItem("image", 4)],
            media_positions=torch.arange(4),
            targets=[TargetItem("drawing", 1, (1,), data=None)],
            target_positions=torch.tensor([15]),
        )
        for _ in range(microbatches)
    ]
    assign_owners(made, layout)
    for microbatch in made:
        for item in microbatch.media:
            item.data = torch.zeros(4, WIDTH) if layout.owns(item) else None
        for target in microbatch.targets:
            target.data = torch.zeros(1) if layout.owns(target) else None
    return Batch(made, layout)


def sleeping_module(rank: int, size: int, unit: float, encoder: float = 1.0, generator: float = 1.0) -> PipelineModule:
    """A model with a layer for each rank.

    Args:
        unit: seconds of a layer's forward.
        encoder, generator: how many times as long the forward of an item takes.
    """
    torch.manual_seed(0)
    encoders, generators = SleepingEncoder(encoder * unit), SleepingGenerator(generator * unit)
    module = PipelineModule(SleepingLLM(size, unit), {"image": encoders}, {"drawing": generators})
    module.part = part_of(rank, [range(k, k + 1) for k in range(size)], range(size))
    module.configure_model()
    return module


def timed_steps(runner: PipelineRunner, microbatches: int, warm_up: int, repeats: int) -> float:
    """The median seconds of training steps, after some that are not counted."""
    seconds = list[float]()
    for _ in range(warm_up + repeats):
        given = batch(microbatches, runner.layout)
        runner.planner(given)  # planned before the step, as a worker does it
        dist.barrier()
        start = time.perf_counter()
        runner(given, "train")
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


KINDS = ("ddp", "fsdp")


def measure(
    rank: int, size: int, microbatches: int, unit: float, repeats: int, group: int
) -> dict[str, tuple[float, float, float]]:
    """For each kind of shards: the median seconds of a step, what its plan says, and the most encoder units alive."""
    prompt_wake_ups()
    mesh, found = build_mesh(torch.device("cpu"), 1, size, range(size)), {}
    for kind in KINDS:
        module = sleeping_module(rank, size, unit)
        sharding = ShardingOptions(kind, kind)  # pyright: ignore[reportArgumentType]
        costs = Costs(F=unit, B=2 * unit, EF=unit, EB=2 * unit, G=3 * unit)
        runner = PipelineRunner(
            module, mesh, PipelineOptions(ScheduleOptions(group_size=group, costs=costs), sharding=sharding)
        )
        seconds, plan = timed_steps(runner, microbatches, 1, repeats), runner.last_plan
        assert plan is not None
        found[kind] = (seconds, plan.makespan, max(plan.peak["encoder_units"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--unit", type=float, default=0.05, help="seconds of a stage's forward")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--group_sizes", type=int, nargs="+", help="default: the number of ranks, and twice that")
    arguments = parser.parse_args()
    size = arguments.ranks
    table = Table(title=f"P={size}, M={arguments.microbatches}: seconds of a step, slowest rank")
    for column in ("group_size", "shards", "seconds", "of ddp", "its plan says", "encoder units"):
        table.add_column(column, justify="right")
    for group in arguments.group_sizes or (size, 2 * size):
        with awake_cores():
            options = (arguments.microbatches, arguments.unit, arguments.repeats, group)
            found = run_ranks(size, measure, size, *options)
        slowest = {kind: max(rank[kind] for rank in found) for kind in KINDS}
        whole, planned, _ = slowest["ddp"]
        for kind, (seconds, makespan, units) in slowest.items():
            of_ddp = (f"{seconds / whole:.3f}x", f"{makespan / planned:.3f}x")
            table.add_row(str(group), kind, f"{seconds:.3f}", *of_ddp, f"{units:g}")
    Console().print(table)


if __name__ == "__main__":
    main()
