"""What a rank stores of encoder and generator (weights, gradients, AdamW moments), and its peak of activations against
the number of microbatches, with whole weights and with shards.

    python -m benchmarks.sharded_memory
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.memory_vs_microbatches import COMPONENTS, batch, model
from benchmarks.ranks import run_ranks
from bigmac_lightning.estimates.partition import LayerCosts, make_stages
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.runtime.sharding import local
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of

KINDS = ("ddp", "zero1", "fsdp")


def measure(rank: int, size: int, counts: list[int]) -> dict[str, tuple[int, list[dict[str, int]]]]:
    """For each kind of shards, the bytes stored of encoder and generator, and the peak of each number of
    microbatches."""
    mesh, found = build_mesh(torch.device("cpu"), 1, size, range(size)), {}
    for kind in KINDS:
        module = model()
        module.part = part_of(rank, make_stages(LayerCosts((1.0,) * module.llm.num_layers), size), range(size))
        module.configure_model()
        options = PipelineOptions(sharding=ShardingOptions(kind, kind))  # pyright: ignore[reportArgumentType]
        runner, peaks = PipelineRunner(module, mesh, options), list[dict[str, int]]()
        for count in counts:
            memory = runner.executor.memory = MemoryTracker([*module.parameters(), *runner.sharding.whole()])
            runner(batch(count, runner.layout), "train")
            peaks.append(memory.peak)
        parameters = [*module.encoders.parameters(), *module.generators.parameters()]
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad])
        optimizer.step()
        stored = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        stored += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        found[kind] = sum(local(tensor).nbytes for tensor in stored), peaks
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 32, 128])
    arguments = parser.parse_args()
    by_rank = run_ranks(arguments.ranks, measure, arguments.ranks, arguments.microbatches)
    table = Table(title=f"largest of {arguments.ranks} ranks; peaks of activations in KiB")
    columns = [f"{name}, M={count}" for count in arguments.microbatches for name in COMPONENTS]
    for column in ("shards", "stored KiB", "of an even share", *columns):
        table.add_column(column, justify="right")
    whole = max(rank["ddp"][0] for rank in by_rank)
    for kind in KINDS:
        stored = max(rank[kind][0] for rank in by_rank)
        ideal = whole if kind == "ddp" else whole / arguments.ranks
        peaks = [
            max(rank[kind][1][i].get(name, 0) for rank in by_rank)
            for i in range(len(arguments.microbatches))
            for name in COMPONENTS
        ]
        table.add_row(
            kind, f"{stored / 1024:,.0f}", f"{stored / ideal:.3f}x", *(f"{peak / 1024:,.0f}" for peak in peaks)
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
