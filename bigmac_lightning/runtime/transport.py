"""Sends and receives tensors between the ranks of a pipeline, asynchronously, with a process group per kind of message
and direction.

Messages have no tags, because NCCL has none. Messages between two ranks in one group arrive in the order in which they
are sent, and the programs of both ranks follow one total order (see ``lowering``), so each receive gets its own
message. Tensors without elements (empty pieces) are not sent: the receiver knows their shapes and makes them.
``Work.wait()`` blocks the CPU with gloo, but only the current stream with NCCL.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bigmac_lightning.runtime.lowering import Message
from bigmac_lightning.runtime.mesh import PipelineMesh


class Transport:
    """The messages of one rank in one step, including those that an action produces for another one on the same
    rank."""

    def __init__(self, mesh: PipelineMesh) -> None:
        self._mesh = mesh
        self._tensors: dict[Message, Tensor] = {}
        self._receiving: dict[Message, dist.Work] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []

    def put(self, message: Message, tensor: Tensor) -> None:
        """Store a tensor until `send` sends it or `take` returns it on this rank."""
        self._tensors[message] = tensor

    def send(self, message: Message, peer: int) -> None:
        """Start to send a stored tensor to the pipeline rank `peer`."""
        tensor = self._tensors.pop(message).contiguous()
        if not tensor.numel():
            return
        # A tensor must stay in memory until it is sent. Those that have been sent meanwhile are released here.
        self._sending = [(work, sent) for work, sent in self._sending if not work.is_completed()]
        group = self._mesh.channels[message.kind, peer > self._mesh.pp_rank]
        work = dist.isend(tensor, self._mesh.pp_ranks[peer], group=group)
        assert work is not None
        self._sending.append((work, tensor))

    def receive(self, message: Message, peer: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Start to receive a tensor of this shape and dtype from the pipeline rank `peer`."""
        tensor = self._tensors[message] = torch.empty(tuple(shape), dtype=dtype, device=self._mesh.device)
        if not tensor.numel():
            return
        group = self._mesh.channels[message.kind, self._mesh.pp_rank > peer]
        work = dist.irecv(tensor, self._mesh.pp_ranks[peer], group=group)
        assert work is not None
        self._receiving[message] = work

    def take(self, message: Message) -> Tensor:
        """Wait for a tensor, remove it from this object, and return it."""
        work = self._receiving.pop(message, None)
        if work is not None:
            work.wait()
        return self._tensors.pop(message)

    def finish(self) -> None:
        """Wait until all tensors have been sent."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        never_taken = [*self._tensors, *self._receiving]
        assert not never_taken, f"these messages were never used: {never_taken}"
