"""What the processes of one pipeline rank, its peers, exchange: each computes some items of the rank's share, and all
of them need the rows of the whole share.

All peers run these functions together, forwards and backwards.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from bigmac_lightning.host import from_host
from bigmac_lightning.runtime.mesh import PipelineMesh


class Peers:
    """The exchange between this process and its peers.

    Args:
        mesh: the process groups; there are peers.
    """

    def __init__(self, mesh: PipelineMesh) -> None:
        self.cp_group = mesh.cp_group if mesh.cp_size > 1 else None
        self.group = mesh.peer_group

    def joined(self, own: Tensor, indices: Tensor, rows: int) -> Tensor:
        """The rows (rows, D) of all peers' items.

        The gradient of a row arrives in parts from the slices of the context peers, and alike on tensor peers. Where
        gradients are on, the result always needs one, so that all peers take part in the sum.

        Args:
            own: (n, D), the rows of this process's items.
            indices: (n,), where they lie among all rows.
        """
        anchor = torch.zeros((), device=own.device, requires_grad=torch.is_grad_enabled())
        return _Joined.apply(own, anchor, indices, rows, self)

    def selected(self, parts: Tensor, indices: Tensor) -> Tensor:
        """The rows (n, D) of this process's items, from rows of which each context peer has those of its slice, and
        zeros elsewhere. The gradient of all rows goes back on all peers.

        Args:
            parts: (rows, D).
            indices: (n,), where the rows lie among all rows.
        """
        return _Selected.apply(parts, indices, self)


def row_indices(lengths: Sequence[int], own: Sequence[bool], device: torch.device) -> Tensor:
    """Where the rows of own items lie among the rows of all items, which have these lengths."""
    starts = list(accumulate(lengths, initial=0))[: len(lengths)]
    mine = [range(start, start + n) for start, n, is_own in zip(starts, lengths, own, strict=True) if is_own]
    return from_host([row for rows in mine for row in rows], torch.long, device)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor, anchor: Tensor, indices: Tensor, rows: int, peers: Peers) -> Tensor:  # pyright: ignore
        ctx.indices, ctx.peers = indices, peers
        whole = own.new_zeros(rows, *own.shape[1:]).index_copy(0, indices, own)
        dist.all_reduce(whole, group=peers.group)
        return whole

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore
        gradient = gradient.clone()
        if ctx.peers.cp_group is not None:
            dist.all_reduce(gradient, group=ctx.peers.cp_group)
        return gradient[ctx.indices], None, None, None, None


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts: Tensor, indices: Tensor, peers: Peers) -> Tensor:  # pyright: ignore
        ctx.shape, ctx.indices, ctx.peers = parts.shape, indices, peers
        whole = parts.clone()
        if peers.cp_group is not None:
            dist.all_reduce(whole, group=peers.cp_group)
        return whole[indices]

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyright: ignore
        whole = gradient.new_zeros(ctx.shape).index_copy(0, ctx.indices, gradient)
        dist.all_reduce(whole, group=ctx.peers.group)
        return whole, None, None
