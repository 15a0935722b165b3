"""Copies that a thread saves while training changes the tensors."""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bigmac_lightning.training.copying import Copies
from tests.training.trainers import on_ranks


def test_copies_do_not_change_with_their_originals() -> None:
    weight, step = torch.nn.Parameter(torch.ones(3, 2)), torch.tensor(7.0)
    state = {("model", "weight"): weight, ("optimizer_0", "step"): step, ("model", "extra"): {"counts": [1]}}
    copies = Copies().of(state)
    with torch.no_grad():
        weight.zero_()
    step += 1
    state["model", "extra"]["counts"].append(2)
    assert torch.equal(copies["model", "weight"], torch.ones(3, 2))
    assert not copies["model", "weight"].requires_grad
    assert copies["optimizer_0", "step"] == 7
    assert copies["model", "extra"] == {"counts": [1]}


def test_memory_is_used_again_if_all_tensors_are_of_the_same_kinds() -> None:
    copies = Copies()
    first = copies.of({("a",): torch.zeros(2, 3).t(), ("b",): torch.ones(4, dtype=torch.bfloat16)})
    places = {path: tensor.data_ptr() for path, tensor in first.items()}
    again = copies.of({("a",): torch.ones(2, 3).t(), ("b",): torch.full((4,), 5.0).bfloat16()})
    assert {path: tensor.data_ptr() for path, tensor in again.items()} == places
    assert torch.equal(again["a",], torch.ones(3, 2))
    assert again["a",].stride() == (1, 3)
    assert (again["b",] == 5).all()
    other: Any = copies.of({("a",): torch.ones(2, 4), ("b",): torch.full((4,), 5.0)})
    assert other["a",].shape == (2, 4)
    assert other["b",].dtype == torch.float32


def _shards(rank: int) -> list[float]:
    mesh, copies = init_device_mesh("cpu", (2,)), Copies()
    for number in (1.0, 2.0):
        shard = distribute_tensor(torch.full((3, 2), number), mesh, [Shard(0)])
        copy = copies.of({("w",): shard})["w",]
        assert isinstance(copy, DTensor)
        assert copy.placements == shard.placements
        shard.to_local().zero_()
    return [float(value) for value in copy.full_tensor().flatten()]


def test_shards_stay_shards() -> None:
    assert on_ranks(2, _shards) == [[2.0] * 6] * 2
