"""Data-parallel peers: whole models (DDP), or weights in shards (FSDP2), on each rank; microbatch after microbatch."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.case import Case
from benchmarks.peers.computing import computing_parts
from benchmarks.peers.data import single_batch
from benchmarks.peers.sleeping import sleeping_parts
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.runtime.sharding import blocks_of

LEARNING_RATE = 1e-3


class PeerModule(PipelineModule):
    """The model of a case, as all peers train it."""

    def __init__(self, case: Case) -> None:
        super().__init__(*(sleeping_parts(case) if case.regime == "sleep" else computing_parts()))
        self.shard: Callable[[PeerModule], None] | None = None
        self.losses: list[Tensor] = []
        self.norms: list[float] = []

    def configure_model(self) -> None:
        fresh = not self._materialized
        super().configure_model()
        if fresh and self.shard is not None:
            self.shard(self)

    def forward(self, batch: Batch) -> Tensor:
        return self.pipeline(batch).loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self(batch)
        self.losses.append(self.last_metrics["loss"].detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.norms:
            self.norms.append(scalar(self.gradient_norm()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all peers."""
    return torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)


def shard_over(mesh: DeviceMesh, module: PeerModule) -> None:
    """Shard a model as FSDP2's guide does: each block of layers, and the rest. Gradients are averaged."""
    for part in [*blocks_of(module), module]:
        fully_shard(part, mesh=mesh)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(float(mesh.size()))
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot average


def scalar(norm: Tensor) -> float:
    """A norm of parameters that may lie in shards."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class DataParallelPeer:
    """Sleeping layers under the wrappers that Lightning's strategies use."""

    def __init__(self, case: Case, rank: int, kind: str) -> None:
        self.module = PeerModule(case)
        if kind == "fsdp2":
            mesh = init_device_mesh("cpu", (case.size,))
            self.module.shard = lambda module: shard_over(mesh, module)
        self.module.configure_model()
        self._model = DistributedDataParallel(self.module) if kind == "ddp" else self.module
        self._batches = [single_batch(case, 0, m) for m in range(rank, case.microbatches, case.size)]

    def step(self) -> float:
        """Gradients of a step, accumulated over this rank's microbatches; returns the mean loss of all ranks."""
        self.module.zero_grad(set_to_none=True)
        losses = list[Tensor]()
        for i, batch in enumerate(self._batches):
            self._sync(i == len(self._batches) - 1)
            loss = self._model(batch) / len(self._batches)
            loss.backward()
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def _sync(self, now: bool) -> None:
        """Whether the next backward sums gradients over the ranks."""
        if isinstance(self._model, DistributedDataParallel):
            self._model.require_backward_grad_sync = now
        elif isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(now)

    def gradient_norm(self) -> float:
        return scalar(self.module.gradient_norm())
