"""Slices of weights that consist of several matrices, such as the gate and up projections of experts.

Tensor parallelism cuts each of the matrices, so a rank's slice consists of several pieces of the whole weight. torch's
DCP takes it for one piece, and would read and write the wrong numbers.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def is_packed(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is such a slice."""
    return isinstance(value, DTensor) and isinstance(value.placements[-1], _StridedShard)


def in_one_piece(value: Any) -> Any:
    """The same tensor in slices of one piece each, if it lies in such slices; any other value as it is. Collective over
    the ranks that have slices of it."""
    if not is_packed(value):
        return value
    device = value.device
    *shards, placement = value.placements  # shards of it on several ranks are joined first
    assert isinstance(placement, _StridedShard)
    whole = [Replicate() for _ in shards]
    value = value.to(value.device_mesh.device_type)  # offloaded shards are on the CPU, and cannot be sent there
    value = value.redistribute(placements=[*whole, placement]) if shards else value
    return value.redistribute(placements=[*whole, Shard(placement.dim)]).to(device)


def pieces_of(value: DTensor) -> Iterator[tuple[torch.Size, Tensor]]:
    """The pieces of the whole tensor that this rank has, as views of its local tensor, each with its offsets in the
    whole.

    Args:
        value: such a slice, or this rank's rows of it, if several ranks have shards of the slice.
    """
    placement, mesh, local = value.placements[-1], value.device_mesh, value.to_local()
    assert isinstance(placement, _StridedShard)
    dim, number = placement.dim % value.ndim, placement.split_factor
    matrix = value.shape[dim] // number
    length = matrix // mesh.size(mesh.ndim - 1)  # of a piece; other sizes are refused
    own = mesh.get_local_rank(mesh.ndim - 1) * length
    rows, first = value.shape[0] if dim else number * length, 0
    if mesh.ndim == 2:
        rows, first = Shard.local_shard_size_and_offset(rows, mesh.size(0), mesh.get_local_rank(0))
    for i in range(number):
        offsets = [0] * value.ndim
        if dim:
            offsets[0], offsets[dim] = first, i * matrix + own
            piece = local.narrow(dim, i * length, length)
        else:  # of the slice's rows, those of this matrix that are here
            start, stop = max(first, i * length), min(first + rows, (i + 1) * length)
            offsets[0] = i * matrix + own + start - i * length
            piece = local.narrow(0, start - first if stop > start else 0, max(stop - start, 0))
        if piece.numel():
            yield torch.Size(offsets), piece
