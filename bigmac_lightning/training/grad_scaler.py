"""Loss scaling for float16: all ranks skip the same steps, and gradients may lie in shards on different ranks."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from bigmac_lightning.runtime.sharding import local


class PipelineGradScaler(ShardedGradScaler):
    """A scaler that unscales each rank's part of the gradients. torch's own takes either whole gradients or shards on
    one mesh."""

    @classmethod
    def like(cls, scaler: torch.amp.GradScaler, device: torch.device) -> "PipelineGradScaler":
        """A scaler with the settings of another one, over all ranks."""
        return cls(
            device=device.type,
            init_scale=scaler.get_scale(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
            process_group=dist.group.WORLD,
        )

    def _unscale_grads_(self, optimizer: Any, *args: Any, **kwargs: Any) -> dict[torch.device, torch.Tensor]:
        groups = [
            {"params": [SimpleNamespace(grad=None if p.grad is None else local(p.grad)) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        stand_in: Any = SimpleNamespace(param_groups=groups)
        return super()._unscale_grads_(stand_in, *args, **kwargs)
