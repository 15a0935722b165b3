"""Measures a short training: what its actions cost, its messages, its activations, its sums of gradients and its
optimizer. `bigmac profile` lets it watch a run, and saves what it has found."""

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.optim import Optimizer

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.schedule.measured_costs import MeanWork, MeasuredCosts
from bigmac_lightning.training import run_facts
from bigmac_lightning.training.activation_bytes import COMPONENTS, work_of
from bigmac_lightning.training.known_costs import model_text, precision_text
from bigmac_lightning.training.measuring import WARM_UP
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.strategy import BigMacStrategy

ROUND_TRIPS = 20
"""How often a message goes to the next rank and back. The median is taken, as the first ones set up connections."""


UNITS = ("encoder_unit", "llm_microbatch", "generator_unit")
"""The fields that have the bytes of a unit of each of `COMPONENTS`."""


@dataclass
class _Found:
    """What one rank has found; see the fields of `MeasuredCosts` with these names."""

    outside: float | None = None
    encoder_unit: float | None = None
    llm_microbatch: float | None = None
    generator_unit: float | None = None
    peak: float | None = None
    message: float | None = None
    optimizer: float | None = None
    reduction: float | None = None


class Profiling(pl.Callback):
    """Watches a training under strategy="bigmac".

    Attributes:
        found: what was measured; ``None`` before the end of the training.
    """

    def __init__(self) -> None:
        self.found: MeasuredCosts | None = None
        self._batches, self._work = 0, list[MeanWork]()
        self._reductions, self._steps, self._outside = list[float](), list[float](), list[float]()
        self._summed: float | None = None
        self._start, self._inside = 0.0, math.nan
        self._bytes = {name: list[float]() for name in UNITS}
        self._own, self._ranks = _Found(), Ranks()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy, runner = _of(trainer)
        runner.executor.memory = MemoryTracker([*pl_module.parameters(), *runner.sharding.whole()])
        if strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(strategy.root_device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        strategy, runner = _of(trainer)
        now = time.perf_counter()
        if self._batches > WARM_UP and not math.isnan(self._inside):
            self._outside.append(max(now - self._start - self._inside, 0.0))
        self._start, self._inside = now, math.nan
        runner.executor.trace, self._summed = Trace(strategy.root_device), None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        trace = _of(trainer)[1].executor.trace
        if trace is None or self._summed is not None or self._batches < WARM_UP:  # a second optimizer's step
            return
        self._summed = trace.elapsed()
        ends = [span.end for span in trace.spans()]
        self._reductions += [self._summed - max(ends)] * bool(ends)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        _, runner = _of(trainer)
        trace, executor = runner.executor.trace, runner.executor
        end = math.nan if trace is None else trace.elapsed()
        began = time.perf_counter()
        if trace is not None and self._summed is not None:
            self._steps.append(end - self._summed)
            self._inside = end - min((span.start for span in trace.spans()), default=math.nan)
        executor.trace = None
        self._work.append(work_of(batch))
        self._batches += 1
        if executor.memory is not None:
            self._count(runner, executor.memory)
            if self._batches == WARM_UP:  # counting bytes takes time
                executor.memory = None
        self._inside += time.perf_counter() - began  # of this callback itself

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy, runner = _of(trainer)
        assert isinstance(pl_module, PipelineModule)
        assert runner.measuring is not None, "the costs are given"
        device, mesh, own = strategy.root_device, runner.mesh, self._own
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            own.peak = float(torch.cuda.max_memory_allocated(device))
        rates = runner.measuring.finish()
        own.reduction = median(self._reductions) if self._reductions else None
        own.optimizer = median(self._steps) if self._steps else None
        own.outside = median(self._outside) if self._outside else None
        for name, found in self._bytes.items():
            setattr(own, name, mean(found) if found else None)
        work = _mean(self._work)
        own.message = _message_seconds(mesh, runner, round(work.tokens))
        everyone: list[_Found] = self._ranks.exchange(own)()[0]
        # a rank that came early has waited for the last one, which is not part of the sums' time
        together = ("reduction", "outside")
        numbers = {f.name: _over(min if f.name in together else max, everyone, f.name) for f in fields(_Found)}
        of_ranks = [everyone[process].llm_microbatch for process in mesh.pp_ranks]
        parallel = runner.options.parallel
        self.found = MeasuredCosts(
            rates=rates,
            work=work,
            layers=tuple(len(stage) for stage in runner.stages),
            pipeline_parallel_size=mesh.pp_size,
            tensor_parallel_size=parallel.tensor,
            context_parallel_size=parallel.context,
            device=_device_text(device),
            precision=precision_text(strategy.precision_plugin.precision),
            model=model_text(pl_module),
            trained=runner.trained.now.names,
            versions=run_facts.versions(),
            left_out=_left_out(numbers),
            rank_microbatches=tuple(size for size in of_ranks if size is not None) if all(of_ranks) else (),
            **numbers,
        )

    def _count(self, runner: PipelineRunner, memory: MemoryTracker) -> None:
        """Note the bytes of a batch's activations for each unit that was alive at the peak."""
        planned = runner.last_planned
        if planned is not None:
            for name, component, number in zip(UNITS, COMPONENTS, planned.alive, strict=True):
                if number and memory.peak.get(component):
                    self._bytes[name].append(memory.peak[component] / number)
        memory.reset_peak()


def _of(trainer: pl.Trainer) -> tuple[BigMacStrategy, PipelineRunner]:
    strategy: Any = trainer.strategy
    assert isinstance(strategy, BigMacStrategy)
    return strategy, strategy.runner


def _mean(works: Sequence[MeanWork]) -> MeanWork:
    numbers = [f.name for f in fields(MeanWork) if f.name != "target_shape"]
    means = {name: sum(getattr(work, name) for work in works) / len(works) for name in numbers}
    return MeanWork(**means, target_shape=max((work.target_shape for work in works), key=math.prod))


def _over(which: Callable[..., float], everyone: Sequence[_Found], name: str) -> float | None:
    known = [number for found in everyone if (number := getattr(found, name)) is not None]
    return which(known) if known else None


def _message_seconds(mesh: PipelineMesh, runner: PipelineRunner, tokens: int) -> float | None:
    """The longest time that the hidden states of a microbatch take to a neighbouring rank, of those that this rank
    sends. Collective over the pipeline; ``None``: this rank sends none."""
    numbers = tokens * runner.module.llm.width // mesh.cp_size
    found = None
    for rank in range(mesh.pp_size - 1):
        if mesh.pp_rank in (rank, rank + 1):
            peer = mesh.pp_ranks[2 * rank + 1 - mesh.pp_rank]
            seconds = _half_of_a_round_trip(mesh, torch.zeros(numbers, dtype=runner.dtype, device=mesh.device), peer)
            found = seconds if mesh.pp_rank == rank else found
    return found


def _half_of_a_round_trip(mesh: PipelineMesh, message: torch.Tensor, peer: int) -> float:
    times, begins = list[float](), mesh.pp_ranks[mesh.pp_rank] < peer
    for _ in range(ROUND_TRIPS):
        begin = time.perf_counter()
        for sends in (begins, not begins):
            (dist.send if sends else dist.recv)(message, peer, group=mesh.pp_group)
        if message.is_cuda:
            torch.cuda.synchronize(message.device)
        times.append((time.perf_counter() - begin) / 2)
    return median(times)


def _device_text(device: torch.device) -> str:
    """The type of a device, and its name after a colon."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type}: {name}"


def _left_out(numbers: dict[str, float | None]) -> tuple[str, ...]:
    reasons = {
        "peak": "only CUDA counts the bytes that are allocated on a device",
        "message": "one rank sends no messages",
        "encoder_unit": "no encoder's activations were alive",
        "llm_microbatch": "no activations of the LLM were alive",
        "generator_unit": "no generator's activations were alive",
        "outside": "fewer than two batches were timed",
        "optimizer": "no optimizer step ended",
        "reduction": "no gradients were summed",
    }
    texts = [f"{name}: {reasons[name]}" for name, number in numbers.items() if number is None]
    return (*texts, "W and I of backbones that split backwards, unless they were run: half of B each")
