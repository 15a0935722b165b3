"""Does a step take as long as the simulator says? The real executor over gloo, with devices that sleep.

A forward of one stage sleeps one unit (50 ms by default), everything else by its cost; messages are real tensors of
2 MB, which the simulation takes for free. Sleeping devices overlap as GPUs would, so P = 8 can be measured on two
cores, best with the right to real-time priority (as root): then a rank that wakes up waits for no other's core.

    python -m benchmarks.schedule_fidelity
    python -m benchmarks.schedule_fidelity --backbones --ranks 4
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
from bigmac_lightning.runtime.computation import Outcome
from bigmac_lightning.runtime.executor import Executor
from bigmac_lightning.runtime.lowering import Needs, lower
from bigmac_lightning.runtime.mesh import PipelineMesh, build_mesh
from bigmac_lightning.runtime.routing import Item, Routing
from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.assign import assign
from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.verify import verify

POLICIES = ("nested", "upfront", "first_stage")
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")
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


class _Join(torch.autograd.Function):
    """Depends on both, computes nothing: the input half of a backward can be had without the weight half."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return _result(tuple(one.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0]


class SleepingWork:
    """A model whose every action sleeps. Each microbatch has one media item and one target of `TOKENS` rows."""

    def __init__(self, plan: Plan, rank: int, unit: float) -> None:
        self.width, self.dtype, self.rank, self.unit, self.plan = WIDTH, torch.float32, rank, unit, plan
        self.features = _routing(plan, plan.encoder_shares, "EF")
        self.conditions = _routing(plan, plan.generator_shares, "G")
        self.weights = [nn.Parameter(torch.zeros(())) for _ in range(plan.stages)]
        self.split = {action.stage for action in plan.ranks[rank] if action.kind == "I"}
        self.live = self.peak = 0

    def hidden_shape(self, microbatch: int, stage: int) -> tuple[int, ...]:
        return (1, TOKENS, WIDTH)

    def encode(self, group: int, piece: int) -> Tensor:
        items = len(self.features.items(group, (self.rank, piece)))
        self.live += items
        self.peak = max(self.peak, self.live)
        pixels = torch.zeros((), requires_grad=True)
        pixels.register_hook(lambda _: self._freed(items))
        if not torch.is_grad_enabled():
            self._freed(items)
        seconds = items * self.unit
        shape = (items * TOKENS, WIDTH)
        return _sleep(pixels, shape, seconds * self.plan.costs.EF, seconds * self.plan.costs.EB)

    def _freed(self, items: int) -> None:
        self.live -= items

    def forward(self, stage: int, microbatch: int, hidden: Tensor | None, features: Tensor | None) -> Outcome:
        given = hidden if hidden is not None else features
        assert given is not None
        shape = (1, TOKENS, WIDTH)
        forward, backward, inputs, weights = (self.unit * self.plan.cost(kind, stage) for kind in KINDS)
        if stage in self.split:
            result = _sleep(given, shape, forward, inputs)
            result = _join(result, _sleep(self.weights[stage], shape, 0.0, weights))
        else:
            result = _sleep(given, shape, forward, backward)
        if stage < self.plan.stages - 1:
            return Outcome(hidden=result)
        if self.conditions.has_items(microbatch):
            return Outcome(conditions=result[0])
        return Outcome(loss=result.sum())

    def generate(self, group: int, piece: int, conditions: Tensor) -> Tensor | None:
        items = len(self.conditions.items(group, (self.rank, piece)))
        return _sleep(conditions, (), items * self.unit * self.plan.costs.G, 0.0)

    def split_weights(self, stage: int) -> list[nn.Parameter]:
        return [self.weights[stage]] if stage in self.split else []


def _routing(plan: Plan, shares: list[list[float]], kind: str) -> Routing:
    """One item per microbatch, owned by the ranks that have a share of its group."""
    items: list[list[Item]] = [[] for _ in range(plan.microbatches)]
    for group, row in zip(plan.groups, shares, strict=False):
        ranks = [r for r, share in enumerate(row) if share > 0]
        for m, owner in zip(group, assign([[1.0] * len(group)], ranks)[0], strict=True):
            items[m].append(Item(owner, TOKENS))
    return Routing(items, plan.groups, plan.pieces(kind))


def _join(one: Tensor, other: Tensor) -> Tensor:
    result = _Join.apply(one, other)
    assert isinstance(result, Tensor)
    return result


def _sleep(x: Tensor, shape: tuple[int, ...], forward: float, backward: float) -> Tensor:
    result = _Sleep.apply(x, shape, forward, backward)
    assert isinstance(result, Tensor)
    return result


def measure(rank: int, plans: list[Plan], unit: float, repeats: int) -> list[tuple[list[float], int]]:
    """Seconds of each repeated step and the peak of live encoder units, for each plan."""
    prompt_wake_ups()
    size = plans[0].pipeline_parallel_size
    meshes: dict[tuple[int, ...], PipelineMesh] = {}
    _Sleep.late = _overshoot()
    results = []
    for plan in plans:
        stage_rank = tuple(plan.stage_rank)
        if stage_rank not in meshes:
            meshes[stage_rank] = build_mesh(torch.device("cpu"), 1, size, stage_rank)
        needs = Needs((True,) * plan.stages, (True,) * plan.microbatches, generator=True)
        program = lower(plan, verify(plan).order, needs)[rank]
        executor = Executor(meshes[stage_rank], stage_rank)
        seconds, peak = [], 0
        for repeat in range(repeats + 1):
            work = SleepingWork(plan, rank, unit)
            dist.barrier()
            start = time.perf_counter()
            executor.run(program, work, needs, plan.recomputes)
            elapsed = torch.tensor([time.perf_counter() - start])
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            if repeat:  # the first one warms up
                seconds.append(elapsed.item())
            peak = max(peak, work.peak)
        results.append((seconds, peak))
    return results


def plans_of_policies(size: int, microbatches: int, generator: float) -> list[Plan]:
    """Each policy on 1F1B."""
    costs = Costs(F=1, B=2, EF=1, EB=2, G=generator)
    return [
        make_plan(PlanRequest(policy=policy, pipeline_parallel_size=size, microbatches=microbatches, costs=costs))
        for policy in POLICIES
    ]


def plans_of_backbones(size: int, microbatches: int, generator: float) -> list[Plan]:
    """Cut and filled on each backbone, with as little of V as it takes to show it; each stage's forward is a unit."""
    plans: list[Plan] = []
    for name, backbone in BACKBONES.items():
        stages = next((stages for stages in backbone.virtual_stages if stages > 1), 1)
        costs = Costs(F=stages, B=2 * stages, I=stages, W=stages, EF=stages, EB=2 * stages, G=generator * stages)
        plans += [
            make_plan(
                PlanRequest(
                    policy=policy,
                    backbone=name,
                    pipeline_parallel_size=size,
                    virtual_stages=stages,
                    microbatches=microbatches,
                    costs=costs,
                )
            )
            for policy in ("nested", "filled")
        ]
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--unit_ms", type=float, default=50.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backbones", action="store_true", help="nested and filled on every backbone")
    arguments = parser.parse_args()
    table = Table(title="step time, measured by sleeping devices / simulated (median of repeats)")
    columns = ("P", "M", "G", *(("backbone", "V") if arguments.backbones else ()), "policy")
    for column in (*columns, "simulated s", "measured s", "measured/simulated"):
        table.add_column(column, justify="right")
    table.add_column("peak units", justify="right")
    table.add_column("nested/this", justify="right")
    table.add_column("simulated", justify="right")
    unit = arguments.unit_ms / 1e3
    make = plans_of_backbones if arguments.backbones else plans_of_policies
    for size in arguments.ranks:
        for generator in (0.0, 3.0):
            plans = make(size, arguments.microbatches, generator)
            with awake_cores():
                by_rank = run_ranks(size, measure, plans, unit, arguments.repeats)
            for i, plan in enumerate(plans):
                measured = statistics.median(by_rank[0][i][0])
                nested = next(n for n, p in enumerate(plans) if (p.backbone, p.policy) == (plan.backbone, "nested"))
                simulated = plan.makespan * unit
                table.add_row(
                    *(str(size), str(plan.microbatches), f"{generator:g}"),
                    *((plan.backbone, str(plan.virtual_stages)) if arguments.backbones else ()),
                    *(plan.policy, f"{simulated:.3f}", f"{measured:.3f}", f"{measured / simulated:.3f}"),
                    str(max(result[i][1] for result in by_rank)),
                    f"{statistics.median(by_rank[0][nested][0]) / measured:.3f}",
                    f"{plans[nested].makespan / plan.makespan:.3f}",
                )
            table.add_section()
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
