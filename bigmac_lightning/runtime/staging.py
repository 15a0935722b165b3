"""Process groups by gloo for ranks whose tensors are on a GPU: everything goes through pinned memory of the host.

With them, several ranks can share one card, which NCCL refuses. gloo itself takes tensors of a GPU for some collectives
only; for messages and for several others it would read their addresses as if they were the host's.

No stream and no host waits for more than the message itself. What is sent is copied to the host on a stream of the
group, once what was given to the device before is done; a thread of the group waits for the copy and only then starts
gloo. What is received is copied to the device by ``Work.wait()``, on the current stream. Tensors of the CPU go to gloo
as they are, but by the same thread, because gloo tells collectives apart by their order, which is that of the calls.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "staged"
"""What ``dist.get_backend()`` says of such groups."""


def staged_backend(device: torch.device) -> str:
    """The name of the backend for tensors of this kind of device, which torch knows from then on."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, StagedGroup, devices=[device.type])
    return NAME


class StagedGroup(dist.ProcessGroup):
    """Has torch's collectives for tensors of a device. Each takes lists of tensors, or one, and torch's options.

    Args:
        store, rank, size, timeout: as for every process group.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(store, rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        host: Any = self
        host._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)
        self._starting, self._sending = _Thread("starts"), _Thread("sends")
        self._streams: dict[torch.device, Any] = {}

    def send(self, tensors: list[Tensor], dstRank: int, tag: int = 0) -> dist.Work:
        copy, copied = self._to_host(tensors[0])

        def start() -> Future[Any]:
            copied()
            # gloo finds out that a message is sent when somebody waits for it. Until then it has the copy.
            return self._sending.call(self._gloo.send([copy], dstRank, tag).wait)

        return _Sent(self._starting.call(start))

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int = 0) -> dist.Work:
        if tensors[0].is_cpu:
            return self._gloo.recv(tensors, srcRank, tag)
        copy = _pinned(tensors[0])
        started = Future[Any]()
        started.set_result(self._gloo.recv([copy], srcRank, tag))  # nothing on the device comes before it
        return _Staged(started, [(tensors[0], copy)])

    def barrier(self, *arguments: Any, **options: Any) -> dist.Work:
        return _Staged(self._starting.call(partial(self._gloo.barrier, *arguments, **options)), [])

    def _run(self, name: str, written: Any, read: Any, *options: Any) -> dist.Work:
        """Start a collective.

        Args:
            name: gloo's method.
            written: the tensors that it fills; a list, a list of lists, or one tensor.
            read: the tensors that it reads; ``None``: those that it fills.
        """
        start = getattr(self._gloo, name)
        copies = {id(tensor): _pinned(tensor) for tensor in _flat(written)}
        waits = []
        for tensor in _flat(written if read is None else read):
            copies[id(tensor)], copied = self._to_host(tensor, copies.get(id(tensor)))
            waits.append(copied)
        arguments = [_replaced(own, copies) for own in (written, read) if own is not None]

        def begin() -> dist.Work:
            for copied in waits:
                copied()
            return start(*arguments, *options)

        results = [(tensor, copies[id(tensor)]) for tensor in _flat(written) if not tensor.is_cpu]
        return _Staged(self._starting.call(begin), results)

    def _to_host(self, tensor: Tensor, copy: Tensor | None = None) -> tuple[Tensor, Callable[[], None]]:
        """A copy in pinned memory, or a tensor of the CPU itself; and a function that waits until it is there, and has
        the tensor, whose memory must not be used for anything else before."""
        copy = _pinned(tensor) if copy is None else copy
        if tensor.is_cpu:
            return copy, _nothing
        module: Any = torch.get_device_module(tensor.device)
        if tensor.device not in self._streams:
            self._streams[tensor.device] = module.Stream(tensor.device)
        stream = self._streams[tensor.device]
        stream.wait_stream(module.current_stream(tensor.device))
        with module.stream(stream):
            copy.copy_(tensor.detach(), non_blocking=True)
        return copy, partial(_wait, stream.record_event(), tensor)


def _wait(event: Any, tensor: Tensor) -> None:
    module: Any = torch.get_device_module(tensor.device)
    with module.device(tensor.device):  # another one's would be used in this thread, and take memory there
        event.synchronize()


def _nothing() -> None: ...


def _in_place(name: str) -> Callable[..., dist.Work]:
    """A collective whose first argument is read and written."""

    def collective(self: StagedGroup, tensors: list[Tensor], *options: Any) -> dist.Work:
        return self._run(name, tensors, None, *options)

    return collective


def _from_to(name: str) -> Callable[..., dist.Work]:
    """A collective whose first argument is written, and whose second one is read."""

    def collective(self: StagedGroup, written: Any, read: Any, *options: Any) -> dist.Work:
        return self._run(name, written, read, *options)

    return collective


for _name in ("allreduce", "allreduce_coalesced", "broadcast", "reduce"):
    setattr(StagedGroup, _name, _in_place(_name))
for _name in ("allgather", "allgather_coalesced", "alltoall", "gather", "reduce_scatter", "scatter"):
    setattr(StagedGroup, _name, _from_to(_name))
_NEW_NAMES = {  # of torch 2.14
    "_allgather_base": "all_gather_single",
    "_reduce_scatter_base": "reduce_scatter_single",
    "alltoall_base": "all_to_all_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
}
for _name, _new in _NEW_NAMES.items():
    _known = _new if hasattr(dist.ProcessGroupGloo, _new) else _name
    setattr(StagedGroup, _name, _from_to(_known))
    setattr(StagedGroup, _new, _from_to(_known))


class _Staged(dist.Work):
    """A collective or a receive that was started, or will be.

    Args:
        started: gives gloo's work.
        results: the tensors of the device that are filled, each with its copy on the host.
    """

    def __init__(self, started: "Future[Any]", results: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._started, self._results = started, results
        self._filled: list[tuple[Any, Any]] = []

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait on the host until gloo is done, and let the current stream wait until the tensors are filled."""
        work = self._started.result()
        work.wait() if timeout is None or not timeout else work.wait(timeout)
        for module, event in self._filled:  # waited for once before, maybe by another stream
            module.current_stream().wait_event(event)
        for tensor, copy in self._results:
            tensor.detach().copy_(copy, non_blocking=True)
            module: Any = torch.get_device_module(tensor.device)
            self._filled.append((module, module.current_stream().record_event()))
        self._results = []
        return True

    def is_completed(self) -> bool:
        return self._started.done() and self._started.result().is_completed() and not self._results


class _Sent(dist.Work):
    """A message that is on its way. `started` gives the future of its end."""

    def __init__(self, started: "Future[Future[Any]]") -> None:
        super().__init__()
        self._started = started

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._started.result().result(timeout.total_seconds() if timeout else None)
        return True

    def is_completed(self) -> bool:
        return self._started.done() and self._started.result().done()


Call = tuple[Callable[[], Any], Future[Any]]


class _Thread:
    """Calls functions one after another in a thread of its own, which does not keep the process from ending."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Call | None] | None = None

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            weakref.finalize(self, self._calls.put, None).atexit = False
            threading.Thread(target=_call_all, args=(self._calls,), name=f"staging {self._name}", daemon=True).start()
        future = Future[Any]()
        self._calls.put((function, future))
        return future


def _call_all(calls: "queue.SimpleQueue[Call | None]") -> None:
    while (call := calls.get()) is not None:
        function, future = call
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del call, function, future  # and the tensors that they have


def _pinned(tensor: Tensor) -> Tensor:
    """Pinned memory for such a tensor; a tensor of the CPU itself."""
    if tensor.is_cpu:
        return tensor
    with torch.inference_mode(False):  # a thread without that mode could not write into it
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _flat(tensors: Any) -> list[Tensor]:
    """All tensors of nested lists."""
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else [tensor for part in tensors for tensor in _flat(part)]


def _replaced(tensors: Any, copies: dict[int, Tensor]) -> Any:
    """Nested lists with the copies instead of the tensors."""
    return copies[id(tensors)] if isinstance(tensors, Tensor) else [_replaced(part, copies) for part in tensors]
