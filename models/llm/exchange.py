"""What the ranks of context parallelism exchange: slices of rows for whole rows of some heads, and sums.

Every rank calls the same methods in the same order. Gradients go back by the opposite exchange.

Shape suffixes: B samples, S tokens of the whole row, H heads, D width of a head. A slice has s tokens.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from bigmac_lightning.contracts.slices import slice_bounds, slice_lengths


class Exchange:
    """The exchange of slices and heads between the ranks of a group, which all call the same methods."""

    def __init__(self, rank: int, size: int, group: Any) -> None:
        """
        Args:
            rank: which slice this rank has.
            size: the number of ranks, n.
            group: their process group.

        Attributes:
            tokens: the number of tokens of whole rows, S, within `rows_of`. A slice's length does not tell it.
        """
        self.rank, self.size, self.group = rank, size, group
        self.tokens = 0

    def rows_of(self, tokens: int) -> "_Rows":
        """A context, in which whole rows have so many tokens. It can be entered again."""
        return _Rows(self, tokens)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The ``context_fn`` of torch's checkpoint: a layer runs again with the length of the rows it ran with."""
        return nullcontext(), self.rows_of(self.tokens)

    @property
    def bounds(self) -> tuple[int, int]:
        """Where this rank's slice lies in whole rows."""
        return slice_bounds(self.tokens, self.rank, self.size)

    def to_heads(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Tensors (B, H / n, S, D) with this rank's part of the heads, from tensors (B, H, s, D) of one type."""
        lengths = slice_lengths(self.tokens, self.size)
        if any(tensor.shape[1] % self.size for tensor in slices):
            raise ValueError(f"{slices[0].shape[1]} attention heads cannot be divided over {self.size} ranks")
        parts = [tensor.chunk(self.size, dim=1) for tensor in slices]
        sent = [torch.cat([part[r].flatten() for part in parts]) for r in range(self.size)]
        shapes = [[(p[0].shape[0], p[0].shape[1], length, p[0].shape[3]) for p in parts] for length in lengths]
        sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
        received = self._all_to_all(torch.cat(sent), [len(one) for one in sent], [sum(row) for row in sizes])
        from_ranks = [
            [flat.view(shape) for flat, shape in zip(flats.split(row), of_rank, strict=True)]
            for flats, row, of_rank in zip(received, sizes, shapes, strict=True)
        ]
        return [torch.cat(tensors, dim=2) for tensors in zip(*from_ranks, strict=True)]

    def to_slices(self, whole: Tensor) -> Tensor:
        """(B, s, H, D) of this rank's tokens, from (B, S, H / n, D) of its heads."""
        lengths = slice_lengths(self.tokens, self.size)
        sent = [part.flatten() for part in whole.split(lengths, dim=1)]
        shape = (whole.shape[0], lengths[self.rank], *whole.shape[2:])
        received = self._all_to_all(torch.cat(sent), [len(one) for one in sent], [math.prod(shape)] * self.size)
        return torch.cat([flat.view(shape) for flat in received], dim=2)

    def _all_to_all(self, sent: Tensor, sizes: list[int], received: list[int]) -> tuple[Tensor, ...]:
        return collectives.all_to_all_single_autograd(sent, received, sizes, self.group).split(received)


class _Rows:
    def __init__(self, exchange: Exchange, tokens: int) -> None:
        self._exchange, self._tokens, self._before = exchange, tokens, 0

    def __enter__(self) -> None:
        self._before, self._exchange.tokens = self._exchange.tokens, self._tokens

    def __exit__(self, *problem: Any) -> None:
        self._exchange.tokens = self._before


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


def sum_of_ranks(part: Tensor, group: Any) -> Tensor:
    """The sum of all ranks' tensors, of which each rank goes on to compute the same.

    The gradient of a rank's tensor is that of its own result, not of all ranks' results: so what is computed from the
    sum is differentiated once, whatever the number of ranks.
    """
    return _SumOfRanks.apply(part, group)
