"""Slices of weights that consist of several matrices, such as the gate and up projections of experts.

Tensor parallelism cuts each of the matrices, so a rank's slice consists of several pieces of the whole weight. torch's
DCP takes it for one piece, and would read and write the wrong numbers.
"""

from typing import Any, TypeGuard

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
