"""Batches on their way from workers, and the exchange between ranks about the next batch while a step runs."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from bigmac_lightning.datamodules.loading.flat_batch import FlatBatch, FlatCollate
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


def test_a_flattened_batch_is_restored() -> None:
    flat = FlatBatch.flatten(contents())
    restored = flat.restore()
    assert_same(restored, contents())
    pixels = restored["pixels"]
    assert pixels.untyped_storage().nbytes() == pixels.nbytes, "one tensor does not count for all others"
    assert flat.block.data_ptr() <= pixels.data_ptr() < flat.block.data_ptr() + flat.block.nbytes


def test_only_batches_of_workers_are_flattened() -> None:
    for workers in (0, 1):
        loader = DataLoader([contents()] * 3, batch_size=None, num_workers=workers, collate_fn=FlatCollate(dict))  # pyright: ignore
        for made in loader:
            assert isinstance(made, FlatBatch) == (workers > 0)
            assert_same(made.restore() if isinstance(made, FlatBatch) else made, contents())


def _tell(rank: int) -> list[tuple[list[Any], bool]]:
    ranks, ready = Ranks(), torch.zeros(1)
    assert ranks.exchange(None)() == ([], True)  # makes the group, which is collective
    heard: list[tuple[list[Any], bool]] = []
    for own, check in ((None, 5), (f"rank {rank}", -5), ("" if rank else "rank 0 alone", 2**55 + rank)):
        if rank == 1:
            dist.recv(ready, 0)
        told = ranks.exchange(own, check)
        if rank == 0:
            dist.send(ready, 1)  # would never come if `tell` waited for rank 1
        heard.append(told())
    return heard


def test_an_exchange_is_started_without_waiting_for_other_ranks() -> None:
    expected = [([], True), (["rank 0", "rank 1"], True), (["rank 0 alone", ""], False)]
    assert run_ranks(2, _tell, timeout=60) == [expected, expected]
