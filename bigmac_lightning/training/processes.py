"""The part of a Lightning strategy that starts processes, gives each its device, and lets them meet in a process group.

It knows nothing of pipelines, models or checkpoints.
"""

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy

from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.meeting import Place, meet
from bigmac_lightning.runtime.staging import staged_backend
from bigmac_lightning.training.cards import check_cards
from bigmac_lightning.training.launching import ScriptLauncher, WholeModelLauncher
from bigmac_lightning.training.parent import end_with_agent, end_with_parent, name_parent

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=30)


class ProcessStrategy(DDPStrategy):
    """Starts processes.

    Args:
        ranks_per_device: how many of them share each of the Trainer's devices.

    Attributes:
        strategy_name: what users call it.
    """

    strategy_name: str

    def __init__(self, *, ranks_per_device: int = 1, **kwargs: Any) -> None:
        self.ranks_per_device = ranks_per_device
        super().__init__(**kwargs)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device of each rank of this node."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, parallel_devices: list[torch.device] | None) -> None:
        if parallel_devices:
            parallel_devices = [device for device in parallel_devices for _ in range(self.ranks_per_device)]
        self._parallel_devices = parallel_devices

    def whole_state_dict(self) -> dict[str, Any]:
        """The whole model's weights, on global rank 0. Collective."""
        raise NotImplementedError

    def setup_environment(self) -> None:
        if isinstance(self.cluster_environment, LightningEnvironment):  # others end their processes themselves
            end_with_parent()
        if isinstance(self.cluster_environment, TorchElasticEnvironment):  # unless it is killed
            end_with_agent()
        super().setup_environment()
        check_cards(Ranks(), self.root_device, dist.get_backend())

    def setup_distributed(self) -> None:
        """Start the process group as Lightning does, in a store of its own, and do not bind it to a device.

        Then torch makes an NCCL communicator with its own stream for each pair of ranks, when they first send to each
        other. Otherwise all messages of a group would share one stream, in which a receive holds up what comes after
        it, and all groups' communicators would be made at the start.
        """
        known = self.cluster_environment
        assert known is not None
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        if self._process_group_backend == "gloo" and self.root_device.type not in ("cpu", "mps"):
            self._process_group_backend = staged_backend(self.root_device)
        if dist.is_initialized():
            return
        place = Place(known.main_address, known.main_port, known.global_rank(), known.world_size())
        store = meet(place, self._timeout or DEFAULT_TIMEOUT, log.warning)
        _init_dist_connection(known, self._process_group_backend, timeout=self._timeout, store=store)

    def _configure_launcher(self) -> None:
        if self._start_method != "popen":
            start_method: Any = self._start_method
            self._launcher = WholeModelLauncher(self, start_method, self.whole_state_dict)
        elif _IS_INTERACTIVE:
            raise ValueError(
                f"strategy={self.strategy_name!r} runs a script once more for each process, which an interactive "
                "session is not: use strategy='bigmac_notebook', or BigMacStrategy(start_method='fork')"
            )
        else:
            assert self.cluster_environment is not None
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        if self.cluster_environment is not None and not self.cluster_environment.creates_processes_externally:
            name_parent()
