"""Sends and receives tensors between the ranks of a pipeline, asynchronously, with a process group per kind of message
and direction.

Messages have no tags, because NCCL has none. Messages between two ranks in one group arrive in the order in which they
are sent, and the programs of both ranks follow one total order (see ``lowering``), so each receive gets its own
message. Tensors without elements (empty pieces) are not sent: the receiver knows their shapes and makes them.
``Work.wait()`` blocks the CPU with gloo, but only the current stream with NCCL.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from bigmac_lightning.runtime.lowering import Message
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.progress import Progress

MOST_SENDING = 8
"""Messages on their way from a rank. gloo does not say that one has arrived before somebody waits for it, so without a
limit all messages of a step would stay in memory until its end. Waiting cannot be a deadlock: the receiver reaches its
place in the total order without anything that this rank does later."""


class Transport:
    """The messages of one rank in one step, including those that an action produces for another one on the same
    rank.

    Args:
        progress: says what this rank waits for.
        timing: records how long it waits.
    """

    def __init__(self, mesh: PipelineMesh, progress: Progress, timing: Trace | None = None) -> None:
        self._mesh, self._progress, self._timing = mesh, progress, timing
        self._tensors: dict[Message, Tensor] = {}
        self._receiving: dict[Message, tuple[dist.Work, int]] = {}
        self._sending: list[tuple[dist.Work, Tensor, Message, int]] = []

    def put(self, message: Message, tensor: Tensor) -> None:
        """Store a tensor until `send` sends it or `take` returns it on this rank."""
        self._tensors[message] = tensor

    def send(self, message: Message, peer: int) -> None:
        """Start to send a stored tensor to the pipeline rank `peer`."""
        tensor = self._tensors.pop(message).contiguous()
        if not tensor.numel():
            return
        # A tensor must stay in memory until it is sent. Those that have been sent meanwhile are released here.
        self._sending = [one for one in self._sending if not one[0].is_completed()]
        while len(self._sending) >= MOST_SENDING:
            self._wait_for(self._sending.pop(0))
        group = self._mesh.channels[message.kind, peer > self._mesh.pp_rank]
        receiver = self._mesh.pp_ranks[peer]
        work = dist.isend(tensor, receiver, group=group)
        assert work is not None
        self._sending.append((work, tensor, message, receiver))

    def receive(self, message: Message, peer: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Start to receive a tensor of this shape and dtype from the pipeline rank `peer`."""
        tensor = self._tensors[message] = torch.empty(tuple(shape), dtype=dtype, device=self._mesh.device)
        if not tensor.numel():
            return
        group = self._mesh.channels[message.kind, self._mesh.pp_rank > peer]
        sender = self._mesh.pp_ranks[peer]
        work = dist.irecv(tensor, sender, group=group)
        assert work is not None
        self._receiving[message] = (work, sender)

    def take(self, message: Message) -> Tensor:
        """Wait for a tensor, remove it from this object, and return it."""
        receiving = self._receiving.pop(message, None)
        if receiving is not None:
            work, sender = receiving
            self._wait(work, message, sender)
        return self._tensors.pop(message)

    def finish(self) -> None:
        """Wait until all tensors have been sent."""
        while self._sending:
            self._wait_for(self._sending.pop(0))
        never_taken = [*self._tensors, *self._receiving]
        assert not never_taken, f"these messages were never used: {never_taken}"

    def _wait_for(self, sending: tuple[dist.Work, Tensor, Message, int]) -> None:
        work, _, message, receiver = sending
        self._wait(work, message, receiver, sending=True)

    def _wait(self, work: dist.Work, message: Message, peer: int, sending: bool = False) -> None:
        self._progress.wait(message, peer, sending)
        with nullcontext() if self._timing is None else self._timing.waiting():
            work.wait()
        self._progress.waiting = None
