"""Moves a module to a device, but for weights whose shards lie in the CPU's memory."""

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from torch import nn
from torch.distributed.tensor import DTensor

from bigmac_lightning.runtime.sharding import is_slice
from bigmac_lightning.training.options import ShardingOptions


def to_device(module: nn.Module, device: torch.device, sharding: ShardingOptions) -> None:
    """Move a module as `module.to(device)` does, but leave offloaded weights and their gradients where they are.

    Whole ones, which are to be cut into shards, are moved block by block when they are cut, so the device need not have
    room for all of them.
    """
    offloaded = [parameter for name, parameter in module.named_parameters() if sharding.offloads(name)]
    staying = [parameter for parameter in offloaded if not _is_whole_slice(parameter)]
    staying += [parameter.grad for parameter in staying if parameter.grad is not None]
    known = {id(tensor) for tensor in staying}
    _update_properties(module, device=device)  # `module.device`
    module._apply(lambda tensor: tensor if id(tensor) in known else tensor.to(device))


def _is_whole_slice(parameter: nn.Parameter) -> bool:
    """Whether this is a tensor peer's slice that is not cut into shards yet; torch wants it on the device for that."""
    return isinstance(parameter, DTensor) and is_slice(parameter) and parameter.device_mesh.ndim == 1
