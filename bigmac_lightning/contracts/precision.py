"""Floating-point types: the types that data are converted to, and the types of sums."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import MediaItem, TargetItem

AnyItem = TypeVar("AnyItem", MediaItem, TargetItem)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """The type in which the module's first floating-point weight is computed with; ``None`` if it has none.

    A shard of a weight may have a wider type than the whole weight: that is its attribute `computing_dtype`.
    """
    first = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    return None if first is None else getattr(first, "computing_dtype", first.dtype)


def converted(item: AnyItem, dtype: torch.dtype | None) -> AnyItem:
    """A copy of the item with floating-point data of this type; ``None``: the item itself."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    data = item.data
    if dtype is None or data is None:
        return item
    return replace(item, data={k: convert(v) for k, v in data.items()} if isinstance(data, dict) else convert(data))
