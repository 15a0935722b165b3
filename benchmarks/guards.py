"""What do the guards of a run cost? Times of each on the host, over gloo.

python -m benchmarks.guards --world 2
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import run_ranks
from bigmac_lightning.contracts.batch import Batch, Microbatch
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.batch_agreement import BatchAgreement
from bigmac_lightning.training.batch_facts import fingerprint, plan_digest
from bigmac_lightning.training.nonfinite import Record
from bigmac_lightning.training.replicas import checksum


def milliseconds(function: Callable[[], object], repeats: int = 200) -> float:
    """The median time of a call."""
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _batch(microbatches: int, tokens: int) -> Batch:
    ids = torch.arange(tokens)
    return Batch(
        [Microbatch({"input_ids": ids[None], "position_ids": ids[None]}, ids, ids) for _ in range(microbatches)]
    )


def _on_rank(rank: int, world: int) -> dict[str, float]:
    mesh, batch = build_mesh(torch.device("cpu"), 1, world, range(world)), _batch(32, 4096)
    agreement = BatchAgreement(Ranks(), mesh, "every")
    agreement.check(batch, (1,), "train", None)
    found = {
        f"compare a batch between {world} ranks": milliseconds(lambda: agreement.check(batch, (1,), "train", None))
    }
    if rank == 0:
        plan = make_plan(ScheduleOptions().request(8, 64))
        hidden, weight = torch.randn(1, 4096, 1024), torch.randn(4096, 4096)
        record = Record(batch, range(32), 2)
        found["fingerprint of 32 x 4096 tokens, in the worker"] = milliseconds(lambda: fingerprint(batch), 20)
        found["digest of a plan of 8 ranks, 64 microbatches, once"] = milliseconds(lambda: plan_digest(plan), 20)
        found["sums of 4096 x 1024 hidden states"] = milliseconds(
            lambda: record.hidden(0, 0, batch.microbatches[0], hidden), 20
        )
        found["checksum of 16 M weights"] = milliseconds(lambda: checksum(weight), 20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=2)
    arguments = parser.parse_args()
    table = Table("guard", "ms")
    for name, value in run_ranks(arguments.world, _on_rank, arguments.world)[0].items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
