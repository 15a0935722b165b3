"""What a rank reads of a checkpoint directory: its part alone, also of slices that consist of several pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from bigmac_lightning.checkpoints.packed import is_packed, pieces_of
from bigmac_lightning.checkpoints.safe import Reader, without_group
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.training.checkpoint import _moments, _room
from tests.ranks import run_ranks

SHAPES = {"experts": (4, 8, 5), "linear": (20, 3), "bias": (20,)}
"""Of the experts and of the linear layer, gate and up projections are one tensor, one after the other. Of three ranks
that have shards of a slice, the last one has no experts, and two of the ten rows, others have four of both matrices."""
DIMENSIONS = {"experts": 1, "linear": 0, "bias": 0}


def _whole() -> dict[str, Tensor]:
    return {name: torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape) for name, shape in SHAPES.items()}


def _save(folder: Path) -> None:
    with without_group():
        dcp.save({"model": _whole()}, checkpoint_id=folder, no_dist=True)


def _slice(whole: Tensor, dim: int, mesh: Any) -> nn.Parameter:
    """A tensor peer's part of both matrices, as the library cuts them."""
    parts = [matrix.chunk(mesh.size(), dim)[mesh.get_local_rank()] for matrix in whole.chunk(2, dim)]
    local = torch.cat(parts, dim).contiguous()
    placement = _StridedShard(dim, split_factor=2)
    made = DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())
    return nn.Parameter(made)


def _read(rank: int, folder: Path, dp: int) -> list[str]:
    """The names of what was read wrongly."""
    mesh = init_device_mesh("cpu", (dp, 2), mesh_dim_names=("dp", "tp"))
    module = nn.Module()
    for name, whole in _whole().items():
        setattr(module, name, _slice(whole, DIMENSIONS[name], mesh["tp"]))
    if dp > 1:
        fully_shard(module, mesh=mesh["dp"])
    own = dict(module.named_parameters())
    assert all(is_packed(parameter) for parameter in own.values())
    assert sum(piece.numel() for p in own.values() for _, piece in pieces_of(p)) == sum(  # pyright: ignore
        p.to_local().numel()  # pyright: ignore[reportCallIssue]
        for p in own.values()
    )
    found = {name: torch.full_like(p, -1) for name, p in own.items()}
    found |= {f"{name}16": torch.full_like(p, -1, dtype=torch.bfloat16) for name, p in own.items()}
    weights = CheckpointWeights(folder)
    weights.read_into({name: found[name] for name in own})
    for name in own:
        weights.read_into({name: found[f"{name}16"]})
    wrong = [name for name, p in own.items() if not torch.equal(local(found[name]), local(p.detach()))]
    return wrong + [n for n, p in own.items() if not torch.equal(local(found[f"{n}16"]), local(p.detach()).bfloat16())]


def local(tensor: Any) -> Tensor:
    return tensor.to_local()


@pytest.mark.parametrize("dp", [1, 3])
def test_slices_of_several_pieces(dp: int, tmp_path: Path) -> None:
    _save(tmp_path)
    assert run_ranks(2 * dp, _read, tmp_path, dp) == [[]] * 2 * dp


def _rooms(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    weight = _slice(_whole()["linear"], 0, mesh).data
    entry = Reader(folder).read_metadata().state_dict_metadata["model.linear"]
    assert _room(entry, weight) is weight
    of_another_type = _room(entry, weight.bfloat16())
    moment = _moments(entry, ("optimizer_0", "state", "linear", "exp_avg"), {"linear": weight})
    for found in (of_another_type, moment):
        assert (found.shape, found.dtype, local(found).shape) == (weight.shape, torch.float32, local(weight).shape)
    assert not isinstance(_room(entry, weight[:4]), DTensor), "another model's weight is read whole, for the error"


def test_room_is_made_for_slices_only(tmp_path: Path) -> None:
    _save(tmp_path)
    run_ranks(2, _rooms, tmp_path)
