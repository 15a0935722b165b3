"""Sends float32 numbers, and their gradients, in messages of a 16-bit type: each number as a sum of three.

A bfloat16 has 8 significant bits, so three of them have the 24 bits of a float32.
"""

from typing import Any

import torch
from torch import Tensor

PARTS = 3


def parts_of(dtype: torch.dtype) -> int:
    """How many numbers of this type carry one float32."""
    return PARTS if dtype.itemsize < 4 else 1


def apart(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers as a flat tensor of this type: first the leading parts of all numbers, then the second parts, ..."""
    return exact.flatten().to(dtype) if parts_of(dtype) == 1 else _Apart.apply(exact.flatten().float(), dtype)


def together(parts: Tensor) -> Tensor:
    """The flat float32 tensor that `apart` was given."""
    return parts if parts_of(parts.dtype) == 1 else _Together.apply(parts)


def _apart(exact: Tensor, dtype: torch.dtype) -> Tensor:
    parts, rest = [], exact
    for _ in range(PARTS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.cat(parts)


def _together(parts: Tensor) -> Tensor:
    return parts.float().view(PARTS, -1).flip(0).sum(0)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, dtype: torch.dtype) -> Tensor:
        return _apart(exact, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _together(gradients[0]), None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        ctx.dtype = parts.dtype
        return _together(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _apart(gradients[0], ctx.dtype)
