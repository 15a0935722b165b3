"""Two sums over a group of ranks that autograd differentiates.

A value that is the same on all ranks of the group has a gradient that is the same on all of them, too. Neither function
changes its input in place, because the same gradient may also go to other places.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over the ranks, on all of them. All ranks must make the same use of it."""
    return _Sum.apply(part, group)


def with_summed_gradient(shared: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A tensor that is the same on all ranks, of which each rank makes another use: its gradient is summed over
    them."""
    return _SumOfGradients.apply(shared, group)


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return gradient, None


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _sum(gradient, ctx.group), None
