"""PipelineMonitor: throughput, memory, and the timeline of one step as it was executed."""

import math
import time
from collections.abc import Sequence
from dataclasses import astuple
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.loggers import TensorBoardLogger

from bigmac_lightning.callbacks.shared import checked, filled, folder_of, replicas_of
from bigmac_lightning.checkpoints.remote import Place
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.estimates.costs import counts_multiplications
from bigmac_lightning.estimates.flops import TrainingFlops
from bigmac_lightning.runtime.executor import Executor
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.measure.trace import Span, Trace, write_chrome_trace
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.schedule import draw
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.schedule.viewer.page import Track, executed_track, planned_track, write_page
from bigmac_lightning.training.activation_bytes import COMPONENTS, ActivationBytes, alive_rows
from bigmac_lightning.training.known_costs import measured_at
from bigmac_lightning.training.measuring import Busy
from bigmac_lightning.training.planner import PlannedBatch
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.strategy import BigMacStrategy

PlanTimes = tuple[float | None, float] | None
"""`seconds` and `bubbles` of a `PlannedBatch`; ``None`` if there was no plan yet."""


class Waiting:
    """How long a training loop waits for its batches."""

    def __init__(self) -> None:
        self._seconds, self._batches, self._since = 0.0, 0, 0.0

    def follow(self, trainer: pl.Trainer) -> None:
        """Follow the training of this trainer from now on."""
        self._seconds, self._batches = 0.0, 0
        loop: Any = trainer.fit_loop.epoch_loop
        given = type(loop)  # its methods tell the profiler

        def begin() -> None:
            given._on_before_fetch(loop)
            self._since = time.perf_counter()

        def end() -> None:
            self._seconds, self._batches = self._seconds + time.perf_counter() - self._since, self._batches + 1
            given._on_after_fetch(loop)

        loop._on_before_fetch, loop._on_after_fetch = begin, end

    def take(self) -> float:
        """The mean seconds of a batch since the last call."""
        mean = self._seconds / max(self._batches, 1)
        self._seconds, self._batches = 0.0, 0
        return mean


class PipelineMonitor(pl.Callback):
    """Logs the parts of the loss, samples/s, tokens/s, times, the gradient norm and peak activation bytes; records one
    step as a trace, a page for browsers and a picture.

    What is measured stands beside what plans say, since the last logged step. ``time/batch``: the mean seconds from
    batch to batch; ``time/data``: those of them in which rank 0 has waited for the next batch; ``time/plan``: those
    that a batch takes in the pipeline by the plans, once they are made from measured times (``costs: auto``).
    ``bubble_share/batch``: the fraction of the time from the first to the last action in which the mean rank is idle,
    while times are measured; ``bubble_share/plan``: the same by the plans. ``memory/<component>/rank<r>``: the peak
    activation bytes; ``memory/<component>/rank<r>/plan``: the same for the units that are alive by the plans, with the
    bytes of a unit that were measured before, if there are any.

    ``throughput/tflops_per_rank`` are the floating-point operations (10^12 in a second) that forward and backward need,
    by the estimates of the components, divided by the number of ranks. ``throughput/mfu`` is what fraction that is of
    what the GPU could compute, if Lightning knows the GPU.

    ``gradient_norm`` is that of all gradients of the logged optimizer step, before they are clipped.

    Under other strategies than "bigmac" there is no pipeline, and it logs the parts of the loss, throughputs and
    ``time/data`` only. Counting bytes costs a Python call per saved tensor; where that matters, set `memory` to false.

    Args:
        memory: whether to log the peak activation bytes.
        trace_step: the optimizer step whose first batch is recorded; ``None``: record nothing.
        trace_every: record again after so many further steps, and so on, for which all ranks wait until rank 0 has
            drawn the picture; ``None``: record once.
        dirpath: the folder for ``trace.json`` (for Chrome or Perfetto), ``timeline.html`` (the plan above the executed
            step) and ``timeline.png``, each with all ranks of the first pipeline, of the last record; ``None``: the
            logger's directory. A `TensorBoardLogger` also gets each picture.

    Attributes:
        artifacts: the files that were written, on global rank 0.
    """

    def __init__(
        self,
        memory: bool = True,
        trace_step: int | None = 5,
        dirpath: str | None = None,
        trace_every: int | None = None,
    ) -> None:
        if trace_every is not None and (trace_every < 1 or trace_step is None):
            raise ValueError(
                f"PipelineMonitor(trace_every={trace_every}) needs at least 1, and a trace_step to begin with"
            )
        self.memory, self.trace_step, self.dirpath, self.trace_every = memory, trace_step, dirpath, trace_every
        self.artifacts: list[Place] = []
        self._samples = self._tokens = 0
        self._flops, self._counted, self._peak = 0.0, None, None
        self._since, self._plans = 0.0, list[PlanTimes]()
        self._bytes, self._rows = ActivationBytes(), [0.0] * len(COMPONENTS)  # the most rows since the last logged step
        self._trace_next: int | None = None  # the next step to record
        self._norm: torch.Tensor | None = None
        self._waiting = Waiting()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        checked(self, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        executor = _executor(trainer)
        if executor is not None and self.memory:
            strategy = trainer.strategy
            assert isinstance(strategy, BigMacStrategy)
            runner = strategy.runner
            executor.memory = MemoryTracker([*pl_module.parameters(), *runner.sharding.whole()])
            self._bytes, known = ActivationBytes(), runner.options.known
            if known is not None:
                known = measured_at(known, runner.module, runner.stages, runner.options, known.work)
                self._bytes.take(known, runner.mesh.pp_rank, runner.mesh.pp_size)
        self._samples, self._tokens, self._flops, self._since, self._plans = 0, 0, 0.0, time.perf_counter(), []
        self._waiting.follow(trainer)
        module = checked(self, pl_module)
        self._counted = TrainingFlops(module) if counts_multiplications(module.llm) else None
        self._peak = get_available_flops(trainer.strategy.root_device, _dtype(trainer))
        self._trace_next = None if executor is None else self.trace_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        executor = _executor(trainer)
        if executor is not None and self._trace_next is not None and trainer.global_step >= self._trace_next:
            trainer.strategy.barrier()  # so that the traces of all ranks begin at the same time
            executor.trace = Trace(trainer.strategy.root_device)
            self._trace_next = None if self.trace_every is None else trainer.global_step + self.trace_every
            if executor.memory is not None:
                executor.memory.recording, executor.memory.curve = True, []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if _executor(trainer) is not None and trainer._logger_connector.should_update_logs:
            self._norm = checked(self, pl_module).gradient_norm()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        executor = _executor(trainer)
        if executor is not None and executor.trace is not None:
            self._write_trace(trainer, executor.trace, executor.memory)
            executor.trace = None
            if executor.memory is not None:
                executor.memory.recording = False
        replicas, _ = replicas_of(trainer)
        self._samples += batch.samples * replicas
        self._tokens += batch.tokens * replicas
        self._flops += 0.0 if self._counted is None else self._counted.of(batch) * replicas
        if isinstance(trainer.strategy, BigMacStrategy):
            planned = trainer.strategy.runner.last_planned
            self._plans.append(None if planned is None else (planned.seconds, planned.bubbles))
            if planned is not None and self.memory:
                self._rows = list(map(max, self._rows, alive_rows(planned, batch)))
        if not trainer._logger_connector.should_update_logs:
            return
        now = time.perf_counter()
        values: dict[str, Any] = {
            "throughput/samples_per_second": self._samples / (now - self._since),
            "throughput/tokens_per_second": self._tokens / (now - self._since),
        }
        values |= self._flops_per_second(trainer, now - self._since)
        values |= _times(self._plans, now - self._since)
        values |= {"time/data": self._waiting.take()}
        if self._norm is not None:
            values["gradient_norm"], self._norm = self._norm, None
        self._samples, self._tokens, self._flops, self._since, self._plans = 0, 0, 0.0, now, []
        values.update({f"loss_parts/{name}": value for name, value in checked(self, pl_module).last_metrics.items()})
        if isinstance(trainer.strategy, BigMacStrategy):
            values |= self._of_ranks(trainer.strategy.runner)
        pl_module.log_dict(values, batch_size=batch.samples)

    def _flops_per_second(self, trainer: pl.Trainer, seconds: float) -> dict[str, float]:
        if self._counted is None:
            return {}
        of_rank = self._flops / seconds / trainer.world_size
        values = {"throughput/tflops_per_rank": of_rank / 1e12}
        return values | ({"throughput/mfu": of_rank / self._peak} if self._peak else {})

    def _of_ranks(self, runner: PipelineRunner) -> dict[str, float]:
        """What every rank of this pipeline has measured since the last call, and what was expected of it. Collective
        over the pipeline."""
        memory, trained, own = runner.executor.memory, runner.trained.now.names, list[float]()
        if runner.measuring is not None:
            own += astuple(runner.measuring.busy)
            runner.measuring.busy = Busy()
        if memory is not None:
            expected = self._bytes.expected(trained, self._rows)
            self._bytes.add(trained, self._rows, memory.peak)
            own += [float(memory.peak.get(name, 0)) for name in COMPONENTS]
            own += [expected.get(name, math.nan) for name in COMPONENTS]
            memory.reset_peak()
            self._rows = [0.0] * len(COMPONENTS)
        everyone, values = _gathered(runner.mesh, own), dict[str, float]()
        if runner.measuring is not None:
            values |= _idle([Busy(*row[:3]) for row in everyone])
            everyone = [row[3:] for row in everyone]
        for rank, row in enumerate(everyone):
            names = [f"memory/{name}/rank{rank}{which}" for which in ("", "/plan") for name in COMPONENTS]
            values |= {name: size for name, size in zip(names, row, strict=False) if not math.isnan(size)}
        return values

    def _write_trace(self, trainer: pl.Trainer, trace: Trace, memory: MemoryTracker | None) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, BigMacStrategy)
        curve = [] if memory is None else [(t - trace.origin_seconds, name, size) for t, name, size in memory.curve]
        mine: tuple[list[Span], list[tuple[float, str, int]]] = (trace.spans(), curve)
        mesh = strategy.mesh
        everyone: list[Any] = [mine]
        if mesh.pp_size > 1:
            everyone = [None] * mesh.pp_size
            dist.all_gather_object(everyone, mine, group=mesh.pp_group)
        folder = folder_of(trainer, self.dirpath)  # collective
        if not strategy.is_global_zero:
            return
        planned = strategy.runner.last_planned
        executed = [[(Action.parse(s.action), s.start, s.end) for s in spans] for spans, _ in everyone]
        curves = [curve for _, curve in everyone] if memory is not None else None
        step, tracks = f"step {trainer.global_step}", _tracks(planned, executed, curves)
        with filled(folder) as local:
            write_chrome_trace(local / "trace.json", [spans for spans, _ in everyone], _messages(planned), curves or ())
            write_page(local / "timeline.html", f"{step}: {' and '.join(track.name for track in tracks)}", tracks)
            draw.measured_picture(executed, local / "timeline.png", f"{step}, as executed", curves)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    from matplotlib.image import imread

                    image = imread(local / "timeline.png")[..., :3]
                    logger.experiment.add_image("timeline", image, trainer.global_step, dataformats="HWC")
        self.artifacts = [folder / name for name in ("trace.json", "timeline.html", "timeline.png")]


def _messages(planned: PlannedBatch | None) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    """Which action sends something to which one of another rank, each as (rank, action)."""
    if planned is None:
        return []
    flow, order = Dataflow(planned.plan), simulate(planned.plan, planned.workload).order
    named = [(rank, str(action)) for rank, action in zip(flow.ranks, flow.actions, strict=True)]
    return [(named[one], named[other]) for one, other in flow.between_ranks(order)]


def _tracks(
    planned: PlannedBatch | None,
    executed: Sequence[Sequence[draw.Span]],
    memory: Sequence[Sequence[tuple[float, str, int]]] | None,
) -> list[Track]:
    """The simulated plan of a batch, if there is one, and the executed step."""
    if planned is None:
        return [executed_track(executed, [], memory)]
    plan, seconds = planned.plan, planned.seconds is not None
    simulated = planned_track(plan, simulate(plan, planned.workload), planned.workload, seconds=seconds)
    return [simulated, executed_track(executed, plan.groups, memory)]


def _dtype(trainer: pl.Trainer) -> torch.dtype:
    """The type in which matrices are multiplied."""
    precision = str(trainer.precision)
    return torch.bfloat16 if precision.startswith("bf16") else torch.half if "16" in precision else torch.float32


def _executor(trainer: pl.Trainer) -> Executor | None:
    """The executor of the pipeline; ``None`` under another strategy."""
    return trainer.strategy.runner.executor if isinstance(trainer.strategy, BigMacStrategy) else None


def _times(plans: Sequence[PlanTimes], seconds: float) -> dict[str, float]:
    """Mean times of the batches that have run in so many seconds."""
    known = [plan for plan in plans if plan is not None]
    if not known:
        return {}
    values = {"time/batch": seconds / len(plans), "bubble_share/plan": fmean(bubbles for _, bubbles in known)}
    planned = [planned for planned, _ in known if planned is not None]
    return values | ({"time/plan": fmean(planned)} if len(planned) == len(known) else {})


def _idle(ranks: Sequence[Busy]) -> dict[str, float]:
    """The idle time of the mean rank, as a fraction of the time from the first to the last action."""
    seconds = max(busy.end for busy in ranks) - min(busy.begin for busy in ranks)
    return {"bubble_share/batch": 1 - fmean(busy.seconds for busy in ranks) / seconds} if seconds > 0 else {}


def _gathered(mesh: PipelineMesh, own: Sequence[float]) -> list[list[float]]:
    """The numbers of every rank of this pipeline. Collective over it."""
    numbers = torch.tensor(own, dtype=torch.float64, device=mesh.device)
    everyone = [torch.empty_like(numbers) for _ in range(mesh.pp_size)]
    if mesh.pp_size > 1 and len(own):
        dist.all_gather(everyone, numbers, group=mesh.pp_group)
    return [row.tolist() for row in everyone] if mesh.pp_size > 1 else [list(own)]
