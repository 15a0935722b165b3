"""Runs the peers whose layers compute, in new processes: in Lightning's Trainer, or torch's schedules in a loop."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.utils.data import DataLoader

from benchmarks.peers import pipelining
from benchmarks.peers.bigmac import schedule_of
from benchmarks.peers.case import DATA_PARALLEL, MEASURING, PIPELINING, Case
from benchmarks.peers.computing import LAYERS
from benchmarks.peers.data import single_loader, step_batch, step_loader
from benchmarks.peers.data_parallel import PeerModule, shard_over
from benchmarks.peers.measuring import Measured, Stopwatch, resident
from benchmarks.ranks import run_ranks
from bigmac_lightning.contracts.batch import Batch, Microbatch, PipelineLayout
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.strategy import BigMacStrategy

WARM_UP, MEMORY_STEP = 2, 1
MEASURED_AFTER = 13
"""In so many steps a training has measured its costs, and has made a plan from them twice."""


class Watch(pl.Callback):
    """Times steps of some batches each."""

    def __init__(self, module: PeerModule, batches: int) -> None:
        self.watch, self.batches = Stopwatch(module, False, MEMORY_STEP), batches

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.watch.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.watch.stop((batch_idx + 1) % self.batches == 0)


class Loader(pl.LightningDataModule):
    """A loader that is made once the layout of the pipeline is known."""

    def __init__(self, make: Callable[[pl.Trainer], DataLoader[Batch]]) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        return self.make(self.trainer)


def compute(case: Case, kind: str, costs: Costs, steps: int) -> list[Measured]:
    """What each rank measures of a peer in so many steps after warming up."""
    if kind not in (*DATA_PARALLEL, *PIPELINING):
        try:
            PipelineOptions(schedule_of(kind, costs)).resolved(case.size, LAYERS, encoder=True, generator=True)
        except ValueError as refusal:
            return [Measured(reason=str(refusal))] * case.size
    return run_ranks(case.size, _compute_rank, case, kind, costs, steps)


def _compute_rank(rank: int, case: Case, kind: str, costs: Costs, steps: int) -> Measured:
    before, warm_up = resident(), WARM_UP + (MEASURED_AFTER if kind == MEASURING else 0)
    if kind in PIPELINING:
        watch = pipelining.train(case, rank, kind, warm_up + steps, MEMORY_STEP)
    else:
        watch = _in_trainer(case, rank, kind, costs, warm_up + steps)
    measured = watch.measured
    measured.rss = resident(peak=True) - before
    for times in (measured.seconds, measured.waited, measured.busy):
        del times[:warm_up]
    return measured


def _in_trainer(case: Case, rank: int, kind: str, costs: Costs, steps: int) -> Stopwatch:
    module, batches = PeerModule(case), 1
    if kind in DATA_PARALLEL:
        batches = case.microbatches // case.size
        data = Loader(lambda _: single_loader(case, steps, rank))
    else:
        data = Loader(lambda trainer: step_loader(case, steps, _strategy(trainer).pipeline_layout))
    if kind == "fsdp2":
        module.shard = lambda sharded: shard_over(_mesh(sharded), sharded)
    callback = Watch(module, batches)
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=case.size,
        strategy=strategy_of(case, kind, costs),
        max_steps=steps,
        accumulate_grad_batches=batches,
        callbacks=[callback],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    losses = torch.stack(module.losses).view(steps, batches).mean(1)
    callback.watch.measured.losses, callback.watch.measured.gradient_norm = losses.tolist(), module.norms[0]
    return callback.watch


def strategy_of(case: Case, kind: str, costs: Costs) -> Strategy:
    """The strategy of a peer."""
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=case.size, tensor_parallel_size=1)
    return BigMacStrategy(schedule=schedule_of(kind, costs), microbatches=case.microbatches)


def _strategy(trainer: pl.Trainer) -> BigMacStrategy:
    assert isinstance(trainer.strategy, BigMacStrategy)
    return trainer.strategy


def _mesh(module: PeerModule) -> Any:
    assert module.device_mesh is not None
    return module.device_mesh["data_parallel"]


def true_costs(case: Case, repeats: int = 5) -> Costs:
    """The times of the actions on a mean microbatch in seconds, each measured alone in this process."""
    module = PeerModule(case)
    module.configure_model()
    microbatches = module.prepare(step_batch(case, 0, PipelineLayout())).microbatches
    times = [[_action_times(module, microbatch) for _ in range(repeats)] for microbatch in microbatches]
    # of each microbatch the median over repeats; of these the mean, as images differ in number
    medians = [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in times]
    EF, EB, F, B, G = (statistics.mean(column) for column in zip(*medians, strict=True))
    F, B = F / case.size, B / case.size
    return Costs(F=F, B=B, I=B / 2, W=B / 2, EF=EF, EB=EB, G=G)


def _action_times(module: PeerModule, microbatch: Microbatch) -> tuple[float, ...]:
    """Seconds of EF, EB, the whole LLM's forward and backward, and G."""
    layers = range(module.llm.num_layers)
    encoded, EF = _timed(lambda: torch.cat(module.encode(microbatch.media)))
    features = encoded.detach().requires_grad_()
    out, F = _timed(lambda: module.run_stage(microbatch, layers, None, {}, features, "train"))
    conditions = out.conditions.detach().requires_grad_()
    pieces = list(conditions.split([item.rows for item in microbatch.targets]))
    losses, forward = _timed(lambda: module.generate(pieces, microbatch.targets))
    _, backward = _timed(lambda: torch.stack(list(losses.values())).sum().backward())
    ends = [out.losses["text"], out.conditions]
    _, B = _timed(lambda: torch.autograd.backward(ends, [None, conditions.grad]))
    _, EB = _timed(lambda: encoded.backward(features.grad))
    return EF, EB, F, B, forward + backward


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
