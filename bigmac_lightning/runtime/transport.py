"""Moves tensors between the ranks of a pipeline: asynchronous sends and receives, a process group per message kind and
direction.

Tensors without elements (empty pieces) do not travel: both sides know their shape.
No tags (NCCL has none): messages between two ranks in one group arrive in the order of the programs, which follow one
total order. `Work.wait()` blocks the CPU on gloo and only the current stream on CUDA.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bigmac_lightning.runtime.lowering import Message
from bigmac_lightning.runtime.mesh import PipelineMesh


class Transport:
    """In- and outbox of one rank for one step. Tensors for the own rank never leave it."""

    def __init__(self, mesh: PipelineMesh) -> None:
        self._mesh = mesh
        self._tensors: dict[Message, Tensor] = {}
        self._arriving: dict[Message, dist.Work] = {}
        self._leaving: list[tuple[dist.Work, Tensor]] = []

    def put(self, message: Message, tensor: Tensor) -> None:
        """Keep a tensor for `send` or for the own `take`."""
        self._tensors[message] = tensor

    def send(self, message: Message, peer: int) -> None:
        """Start sending what was put, to the pipeline rank `peer`."""
        tensor = self._tensors.pop(message).contiguous()
        if not tensor.numel():
            return
        self._leaving = [(work, kept) for work, kept in self._leaving if not work.is_completed()]
        group = self._mesh.channels[message.kind, peer > self._mesh.pp_rank]
        work = dist.isend(tensor, self._mesh.pp_ranks[peer], group=group)
        assert work is not None
        self._leaving.append((work, tensor))

    def receive(self, message: Message, peer: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Start receiving from the pipeline rank `peer`."""
        tensor = self._tensors[message] = torch.empty(tuple(shape), dtype=dtype, device=self._mesh.device)
        if not tensor.numel():
            return
        group = self._mesh.channels[message.kind, self._mesh.pp_rank > peer]
        work = dist.irecv(tensor, self._mesh.pp_ranks[peer], group=group)
        assert work is not None
        self._arriving[message] = work

    def take(self, message: Message) -> Tensor:
        """The tensor, once it is there; it is forgotten here."""
        work = self._arriving.pop(message, None)
        if work is not None:
            work.wait()
        return self._tensors.pop(message)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()
        never_taken = [*self._tensors, *self._arriving]
        assert not never_taken, never_taken
