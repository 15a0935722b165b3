"""Where the ranks of a benchmark or a test compute, and how they send: on the CPU, several on one card, or each on its
own card."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from bigmac_lightning.runtime.staging import staged_backend


@dataclass(frozen=True)
class Place:
    """
    Attributes:
        kind: of the device: "cpu" or "cuda".
        backend: "gloo", with which ranks share cards if there are not enough, or "nccl".
    """

    kind: str = "cpu"
    backend: str = "gloo"

    @property
    def start_method(self) -> str:
        """How processes are started: a forked one could not use CUDA if its parent has."""
        return "fork" if self.kind == "cpu" else "spawn"

    def why_not(self, ranks: int) -> str:
        """Why so many ranks cannot run here; empty if they can. Nothing of CUDA is started if there is no card."""
        if self.kind == "cpu":
            return ""
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        needed = ranks if self.backend == "nccl" else 1
        return "" if cards >= needed else f"needs {needed} GPUs, and there are {cards}"

    def device(self, rank: int) -> torch.device:
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", rank % torch.cuda.device_count())

    def open(self, rank: int, world_size: int, store: str, timeout: timedelta) -> torch.device:
        """Let this process have its device, and a process group with the others.

        Args:
            store: as the `init_method` of ``dist.init_process_group``.
        """
        device, backend = self.device(rank), self.backend
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = False  # results are compared with float32
            backend = staged_backend(device) if backend == "gloo" else backend
        dist.init_process_group(backend, store, timeout=timeout, rank=rank, world_size=world_size)
        return device


CPU = Place()
ONE_CARD = Place("cuda", "gloo")
OWN_CARDS = Place("cuda", "nccl")
