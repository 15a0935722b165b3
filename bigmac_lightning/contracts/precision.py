"""Floating-point types: what data are turned into, and what sums are taken in.

Knows tensors only.
"""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import MediaItem, TargetItem

AnyItem = TypeVar("AnyItem", MediaItem, TargetItem)


def widened(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """Of the first of a module's floating-point weights; ``None`` if it has none."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def converted(item: AnyItem, dtype: torch.dtype | None) -> AnyItem:
    """An item whose floating-point data have a type; ``None``: the one that they have."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    data = item.data
    if dtype is None or data is None:
        return item
    return replace(item, data={k: convert(v) for k, v in data.items()} if isinstance(data, dict) else convert(data))
