"""Does a step take as long as the simulator says? The real executor over gloo, with devices that sleep.

A forward of one stage sleeps one unit (50 ms by default), everything else by its cost; messages are real tensors of
2 MB, which the simulation takes for free. Sleeping devices overlap as GPUs would, so P = 8 can be measured on two
cores, best with the right to real-time priority (as root): then a rank that wakes up waits for no other's core.

    python -m benchmarks.schedule_fidelity
"""

import argparse
import math
import statistics
import time
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.ranks import awake_cores, prompt_wake_ups, run_ranks
from bigmac_lightning.batch import balance
from bigmac_lightning.runtime.executor import Executor, Outcome
from bigmac_lightning.runtime.lowering import Needs, lower
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.runtime.routing import Routing
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.policies import make_plan
from bigmac_lightning.schedule.verify import verify

POLICIES = ("nested", "upfront", "first_stage")
TOKENS, WIDTH = 512, 1024  # hidden states of 2 MB in fp32


def _overshoot() -> float:
    """By how many seconds a sleeping device is late, usually, autograd's call included: no part of a device."""
    late = []
    for _ in range(20):
        start = time.perf_counter()
        x = torch.zeros((), requires_grad=True)
        _sleep(x, (), 0.02, 0.02).backward()
        late.append((time.perf_counter() - start - 0.04) / 2)
    return statistics.median(late)


@cache
def _memory(elements: int) -> Tensor:
    return torch.zeros(elements)


def _result(shape: tuple[int, ...]) -> Tensor:
    """What a sleeping device has computed: it costs the CPU nothing to make, as on a real device."""
    return _memory(math.prod(shape)).view(shape).detach()


class _Sleep(torch.autograd.Function):
    """Takes `forward` seconds, and `backward` seconds in the backward pass; computes nothing."""

    late = 0.0  # seconds to sleep less, see `_overshoot`

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], forward: float, backward: float) -> Tensor:
        ctx.shape, ctx.seconds = x.shape, backward
        time.sleep(max(0.0, forward - _Sleep.late))
        return _result(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        time.sleep(max(0.0, ctx.seconds - _Sleep.late))
        return _result(ctx.shape), None, None, None


class SleepingWork:
    """A model whose every action sleeps. Each microbatch has one media item and one target of `TOKENS` rows."""

    def __init__(self, plan: Plan, rank: int, unit: float) -> None:
        self.width, self.dtype, self.rank, self.unit, self.costs = WIDTH, torch.float32, rank, unit, plan.costs
        owners: dict[str, list[int]] = {"encoder": [0] * plan.microbatches, "generator": [0] * plan.microbatches}
        for kind, shares in (("encoder", plan.encoder_shares), ("generator", plan.generator_shares)):
            for group, row in zip(plan.groups, shares, strict=False):
                ranks = [r for r, share in enumerate(row) if share > 0]
                for m, owner in zip(group, balance([1.0] * len(group), ranks), strict=True):
                    owners[kind][m] = owner
        rows = [[(owner, TOKENS)] for owner in owners["encoder"]]
        self.features = Routing(rows if plan.encoder_shares else [[] for _ in rows], plan.groups)
        rows = [[(owner, TOKENS)] for owner in owners["generator"]]
        self.conditions = Routing(rows if plan.generator_shares else [[] for _ in rows], plan.groups)
        self.last = len(plan.stage_rank) - 1
        self.live = self.peak = 0

    def hidden_shape(self, microbatch: int, stage: int) -> tuple[int, ...]:
        return (1, TOKENS, WIDTH)

    def encode(self, group: int) -> Tensor:
        items = len(self.features.items(group, self.rank))
        self.live += items
        self.peak = max(self.peak, self.live)
        pixels = torch.zeros((), requires_grad=True)
        pixels.register_hook(lambda _: self._freed(items))
        shape = (items * TOKENS, WIDTH)
        return _sleep(pixels, shape, items * self.unit * self.costs.EF, items * self.unit * self.costs.EB)

    def _freed(self, items: int) -> None:
        self.live -= items

    def forward(self, stage: int, microbatch: int, hidden: Tensor | None, features: Tensor | None) -> Outcome:
        given = hidden if hidden is not None else features
        assert given is not None
        shape = (1, TOKENS, WIDTH)
        result = _sleep(given, shape, self.unit * self.costs.F, self.unit * self.costs.B)
        if stage < self.last:
            return Outcome(hidden=result)
        if self.conditions.has_items(microbatch):
            return Outcome(conditions=result[0])
        return Outcome(loss=result.sum())

    def generate(self, group: int, conditions: Tensor) -> Tensor | None:
        items = len(self.conditions.items(group, self.rank))
        return _sleep(conditions, (), items * self.unit * self.costs.G, 0.0)

    def split_weights(self, stage: int) -> list[nn.Parameter]:
        return []


def _sleep(x: Tensor, shape: tuple[int, ...], forward: float, backward: float) -> Tensor:
    result = _Sleep.apply(x, shape, forward, backward)
    assert isinstance(result, Tensor)
    return result


def measure(rank: int, plans: list[Plan], unit: float, repeats: int) -> list[tuple[list[float], int]]:
    """Seconds of each repeated step and the peak of live encoder units, for each plan."""
    prompt_wake_ups()
    size = plans[0].pipeline_parallel_size
    mesh = build_mesh(torch.device("cpu"), 1, size, range(size))
    _Sleep.late = _overshoot()
    results = []
    for plan in plans:
        needs = Needs((True,) * size, encoder=True, generator=True)
        program = lower(plan, verify(plan).order, needs)[rank]
        executor = Executor(mesh, plan.stage_rank)
        seconds, peak = [], 0
        for repeat in range(repeats + 1):
            work = SleepingWork(plan, rank, unit)
            dist.barrier()
            start = time.perf_counter()
            executor.run(program, work, needs)
            elapsed = torch.tensor([time.perf_counter() - start])
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if repeat:  # the first one warms up
                seconds.append(elapsed.item())
            peak = max(peak, work.peak)
        results.append((seconds, peak))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--unit_ms", type=float, default=50.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    table = Table(title="step time, measured by sleeping devices / simulated (median of repeats)")
    for column in ("P", "M", "G", "policy", "simulated s", "measured s", "measured/simulated"):
        table.add_column(column, justify="right")
    table.add_column("peak units", justify="right")
    table.add_column("nested/this", justify="right")
    table.add_column("simulated", justify="right")
    unit = arguments.unit_ms / 1e3
    for size in arguments.ranks:
        for generator in (0.0, 3.0):
            costs = Costs(F=1, B=2, EF=1, EB=2, G=generator)
            plans = [
                make_plan(policy=policy, pipeline_parallel_size=size, microbatches=arguments.microbatches, costs=costs)
                for policy in POLICIES
            ]
            with awake_cores():
                by_rank = run_ranks(size, measure, plans, unit, arguments.repeats)
            nested = statistics.median(by_rank[0][0][0])
            for i, plan in enumerate(plans):
                measured = statistics.median(by_rank[0][i][0])
                simulated = plan.makespan * unit
                table.add_row(
                    *(str(size), str(plan.microbatches), f"{generator:g}", plan.policy),
                    *(f"{simulated:.3f}", f"{measured:.3f}", f"{measured / simulated:.3f}"),
                    str(max(result[i][1] for result in by_rank)),
                    *(f"{nested / measured:.3f}", f"{plans[0].makespan / plan.makespan:.3f}"),
                )
            table.add_section()
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
