"""Loss scaling for float16: all ranks skip the same steps, and gradients may lie in shards on different ranks."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from bigmac_lightning.runtime.gradients import by_device
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

    def _unscale_grads_(
        self, optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool = True
    ) -> dict[torch.device, Tensor]:
        """Unscale the gradients of each device. Offloaded ones are on the CPU, to which torch would copy the scale
        without waiting for it. All ranks get one flag, whatever devices their gradients are on, as they sum it."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        flags = [torch.zeros_like(found_inf)]
        for gradients in by_device(local(p.grad) for p in parameters if p.grad is not None):
            stand_in: Any = SimpleNamespace(param_groups=[{"params": [SimpleNamespace(grad=g) for g in gradients]}])
            given = inv_scale.to(gradients[0].device), found_inf.to(gradients[0].device)
            flags += [
                flag.to(found_inf.device) for flag in super()._unscale_grads_(stand_in, *given, allow_fp16).values()
            ]
        return {found_inf.device: torch.stack(flags).amax(0)}
