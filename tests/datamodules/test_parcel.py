"""Batches on their way from workers, and ranks that tell each other of the next one while a step runs."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from bigmac_lightning.datamodules.loading.parcel import Parcel, ParcelCollate
from bigmac_lightning.ranks import Ranks
from tests.ranks import run_ranks


def contents() -> dict[str, Any]:
    return {
        "pixels": torch.arange(24.0).view(2, 3, 4).transpose(0, 2),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "number": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 5, dtype=torch.long),
        "rest": ("text", 3, None),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        else:
            assert found[name] == value


def test_what_is_packed_comes_out() -> None:
    parcel = Parcel.pack(contents())
    opened = parcel.open()
    assert_same(opened, contents())
    pixels = opened["pixels"]
    assert pixels.untyped_storage().nbytes() == pixels.nbytes, "one tensor does not count for all others"
    assert parcel.block.data_ptr() <= pixels.data_ptr() < parcel.block.data_ptr() + parcel.block.nbytes


def test_batches_travel_in_one_block_from_a_worker_only() -> None:
    for workers in (0, 1):
        loader = DataLoader([contents()] * 3, batch_size=None, num_workers=workers, collate_fn=ParcelCollate(dict))  # pyright: ignore
        for made in loader:
            assert isinstance(made, Parcel) == (workers > 0)
            assert_same(made.open() if isinstance(made, Parcel) else made, contents())


def _tell(rank: int) -> list[tuple[list[Any], bool]]:
    ranks, ready = Ranks(), torch.zeros(1)
    assert ranks.tell(None)() == ([], True)  # makes the group, which is collective
    heard: list[tuple[list[Any], bool]] = []
    for own, check in ((None, 5), (f"rank {rank}", -5), ("" if rank else "rank 0 alone", 2**55 + rank)):
        if rank == 1:
            dist.recv(ready, 0)
        told = ranks.tell(own, check)
        if rank == 0:
            dist.send(ready, 1)  # would never come if `tell` waited for rank 1
        heard.append(told())
    return heard


def test_telling_does_not_wait_for_the_others() -> None:
    expected = [([], True), (["rank 0", "rank 1"], True), (["rank 0 alone", ""], False)]
    assert run_ranks(2, _tell, timeout=60) == [expected, expected]
