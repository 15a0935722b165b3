"""What is measured of a peer: the time of steps, waiting for data, busy time, activations and resident memory."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from benchmarks.peers.sleeping import Device
from bigmac_lightning.runtime.measure.memory import MemoryTracker


@dataclass
class Measured:
    """What one rank has measured of a peer.

    Attributes:
        seconds: of each step, from the first of its batches to the end on all ranks, without waiting for data.
        waited: seconds of each step between batches: for data, and for what Lightning does there.
        busy: seconds of each step in which this rank computed: slept as a device, or used the CPU.
        losses: of each step, the same on all ranks.
        gradient_norm: of the whole model in the first step.
        activations: at the peak; bytes, or the forward time of what saved them if layers sleep.
        state: bytes of weights.
        simulated: how long a step takes by its plan, in units; 0 if there is none.
        rss: by how many bytes the resident memory of the process has grown.
        reason: why the peer could not run this case; empty if it could.
    """

    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norm: float = 0.0
    activations: float = 0.0
    state: float = 0.0
    rss: float = 0.0
    simulated: float = 0.0
    reason: str = ""


class Stopwatch:
    """Takes the time of steps, each of which has one or more batches.

    Args:
        module: the model, whose activations are measured in step number `memory_step`. (This takes time.)
        sleeping: whether layers sleep.
    """

    def __init__(self, module: nn.Module, sleeping: bool, memory_step: int | None = None) -> None:
        self.measured, self._module, self._sleeping, self._memory_step = Measured(), module, sleeping, memory_step
        self._hooks, self._tracker = ExitStack(), None
        self._within = False
        self._ended = time.perf_counter()

    def start(self) -> None:
        """A batch begins."""
        now, measured = time.perf_counter(), self.measured
        if not self._within:
            for times in (measured.seconds, measured.waited, measured.busy):
                times.append(0.0)
            measured.waited[-1] += now - self._ended
            self._within = True
            if len(measured.seconds) - 1 == self._memory_step:
                self._tracker = MemoryTracker(_weights(self._module))
                self._hooks.enter_context(self._tracker.component("all"))
            dist.barrier()
        else:
            measured.waited[-1] += now - self._ended
        self._started, self._busy = time.perf_counter(), self._busy_until_now()

    def stop(self, last: bool = True) -> None:
        """A batch ends; whether it is the last one of its step."""
        measured = self.measured
        measured.busy[-1] += self._busy_until_now() - self._busy
        if last:
            self._within = False
            self._hooks.close()
            dist.barrier()
        self._ended = time.perf_counter()
        measured.seconds[-1] += self._ended - self._started
        if last and self._tracker is not None:
            measured.activations, self._tracker = float(self._tracker.peak.get("all", 0)), None

    def _busy_until_now(self) -> float:
        return Device.busy if self._sleeping else time.process_time()


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """The weights, and whole ones of which the module has shards: they are no activations."""
    whole = [
        parameter._unsharded_param
        for part in module.modules()
        if isinstance(part, FSDPModule)
        for group in part._get_fsdp_state()._fsdp_param_groups
        for parameter in group.fsdp_params
        if hasattr(parameter, "_unsharded_param")
    ]
    return [*module.parameters(), *whole]


def resident(peak: bool = False) -> float:
    """Resident bytes of this process now, or at most since it began."""
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return float(line.split()[1]) * 1024
