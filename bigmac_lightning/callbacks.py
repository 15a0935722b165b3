"""Callbacks: what the pipeline does (PipelineMonitor) and what the generators draw (SampleImages)."""

import time
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bigmac_lightning.batch import Batch
from bigmac_lightning.module import PipelineModule
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.executor import Executor
from bigmac_lightning.runtime.memory import MemoryTracker
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.trace import Span, Trace, write_chrome_trace
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.draw import measured_picture
from bigmac_lightning.strategy import BigMacStrategy

COMPONENTS = ("encoder", "llm", "generator")


class PipelineMonitor(pl.Callback):
    """Logs loss parts, samples/s, tokens/s and peak activation bytes; records one step as a trace and a picture.

    Under other strategies than "bigmac" there is no pipeline to look into: loss parts, samples/s and tokens/s only.
    Counting bytes costs a Python call per saved tensor: leave the callback out, or `memory` off, where every
    microsecond counts.

    Args:
        memory: log ``memory/<component>/rank<r>``, the peak activation bytes since the last logged step.
        trace_step: the optimizer step whose first batch is recorded; ``None``: record nothing.
        dirpath: where ``trace.json`` (Chrome/Perfetto, all ranks of the first pipeline) and ``timeline.png`` go;
            ``None``: the logger's directory.

    Attributes:
        artifacts: files written, on global rank 0.
    """

    def __init__(self, memory: bool = True, trace_step: int | None = 5, dirpath: str | None = None) -> None:
        self.memory, self.trace_step, self.dirpath = memory, trace_step, dirpath
        self.artifacts: list[Path] = []
        self._samples = self._tokens = 0
        self._since = 0.0
        self._trace_next = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _check(self, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        executor = _executor(trainer)
        if executor is not None and self.memory:
            executor.memory = MemoryTracker(pl_module.parameters())
        self._samples, self._tokens, self._since = 0, 0, time.perf_counter()
        self._trace_next = executor is not None and self.trace_step is not None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        executor = _executor(trainer)
        if executor is None or not self._trace_next or self.trace_step is None:
            return
        if trainer.global_step >= self.trace_step:
            trainer.strategy.barrier()  # a common origin for the clocks of all ranks
            executor.trace = Trace(trainer.strategy.root_device)
            if executor.memory is not None:
                executor.memory.recording, executor.memory.curve = True, []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        executor = _executor(trainer)
        if executor is not None and executor.trace is not None:
            self._write_trace(trainer, executor.trace, executor.memory)
            executor.trace, self._trace_next = None, False
            if executor.memory is not None:
                executor.memory.recording = False
        replicas, _ = _replicas(trainer)
        self._samples += batch.samples * replicas
        self._tokens += batch.tokens * replicas
        if not trainer._logger_connector.should_update_logs:
            return
        now = time.perf_counter()
        values: dict[str, Any] = {
            "throughput/samples_per_second": self._samples / (now - self._since),
            "throughput/tokens_per_second": self._tokens / (now - self._since),
        }
        self._samples, self._tokens, self._since = 0, 0, now
        values.update({f"loss_parts/{name}": value for name, value in _check(self, pl_module).last_metrics.items()})
        if executor is not None and executor.memory is not None:
            values.update(_peaks(executor.mesh, executor.memory))
        pl_module.log_dict(values, batch_size=batch.samples)

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
        folder = _folder(trainer, self.dirpath)  # collective
        if not strategy.is_global_zero:
            return
        spans = [spans for spans, _ in everyone]
        write_chrome_trace(folder / "trace.json", spans)
        measured_picture(
            [[(Action.parse(s.action), s.start, s.end) for s in rank] for rank in spans],
            folder / "timeline.png",
            title=f"step {trainer.global_step}, as executed",
            memory=[curve for _, curve in everyone] if memory is not None else None,
        )
        self.artifacts = [folder / "trace.json", folder / "timeline.png"]


class SampleImages(pl.Callback):
    """Lets the generators draw the DataModule's prediction prompts: a PNG grid, and an image in TensorBoard.

    Under any strategy; data-parallel replicas share the prompts out.

    Args:
        every_n_epochs: draw after the validation of every n-th epoch (and always after the last).
        columns: images per row of the grid.
        value_range: pixel values of black and white.
        dirpath: where ``samples.png`` goes; ``None``: the logger's directory.

    Attributes:
        artifacts: files written, on global rank 0.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        columns: int = 10,
        value_range: tuple[float, float] = (-1.0, 1.0),
        dirpath: str | None = None,
    ) -> None:
        self.every_n_epochs, self.columns, self.value_range, self.dirpath = (
            every_n_epochs,
            columns,
            value_range,
            dirpath,
        )
        self.artifacts: list[Path] = []
        self._ranks = Ranks()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.sanity_checking or (epoch % self.every_n_epochs and epoch != trainer.max_epochs):
            return
        drawn = self._draw(trainer, _check(self, pl_module))
        folder = _folder(trainer, self.dirpath)  # collective
        if not trainer.is_global_zero or not drawn:
            return
        from torchvision.utils import make_grid, save_image

        times = max(1, 64 // min(drawn[0].shape[-2:]))  # so that small pictures can be seen
        enlarged = [image.repeat_interleave(times, -1).repeat_interleave(times, -2) for image in drawn]
        low, high = self.value_range
        enlarged = [((image - low) / (high - low)).clamp(0, 1) for image in enlarged]
        grid = make_grid(enlarged, self.columns, padding=4, pad_value=0.5)
        save_image(grid, folder / "samples.png")
        self.artifacts = [folder / "samples.png"]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, trainer.global_step)

    def _draw(self, trainer: pl.Trainer, module: PipelineModule) -> list[Tensor]:
        """What all replicas have drawn, in the order of the prompts, which were dealt out in turn. Collective."""
        datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        precision = trainer.precision_plugin
        own: list[Tensor] = []
        for batch in datamodule.predict_dataloader():
            given = precision.convert_input(batch).to(module.device)
            with nullcontext() if module.runner is not None else precision.forward_context():
                own += [sample.float().cpu() for sample in module.pipeline(given, sample=True).samples or []]
        replicas, replica = _replicas(trainer)
        told, _ = self._ranks.tell((replica, own))()
        by_replica = dict(told)
        rounds = zip_longest(*(by_replica[r] for r in range(replicas)))
        return [image for turn in rounds for image in turn if image is not None]


def _check(callback: pl.Callback, module: pl.LightningModule) -> PipelineModule:
    if not isinstance(module, PipelineModule):
        raise TypeError(
            f"{type(callback).__name__} is for a PipelineModule, not for {type(module).__name__}: remove it"
        )
    return module


def _executor(trainer: pl.Trainer) -> Executor | None:
    """What runs the pipeline, if there is one."""
    return trainer.strategy.pipeline.executor if isinstance(trainer.strategy, BigMacStrategy) else None


def _replicas(trainer: pl.Trainer) -> tuple[int, int]:
    """How many data-parallel replicas there are, and which one this process belongs to."""
    place: dict[str, int] = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    return place["num_replicas"], place["rank"]


def _peaks(mesh: PipelineMesh, memory: MemoryTracker) -> dict[str, float]:
    """Peak bytes of every rank of this pipeline since the last call."""
    own = torch.tensor([float(memory.peak.get(name, 0)) for name in COMPONENTS], device=mesh.device)
    memory.reset_peak()
    everyone = [torch.empty_like(own) for _ in range(mesh.pp_size)]
    if mesh.pp_size > 1:
        dist.all_gather(everyone, own, group=mesh.pp_group)
    else:
        everyone = [own]
    return {
        f"memory/{name}/rank{rank}": value
        for rank, values in enumerate(everyone)
        for name, value in zip(COMPONENTS, values.tolist(), strict=True)
    }


def _folder(trainer: pl.Trainer, dirpath: str | None) -> Path:
    """Where files go. Collective: the logger's directory is rank 0's."""
    folder = Path(dirpath or trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
