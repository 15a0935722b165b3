"""Which device each rank has."""

import pytest
import torch

from bigmac_lightning import BigMacStrategy
from bigmac_lightning.training.cards import refuse_shared
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights


def test_ranks_of_a_device_follow_each_other() -> None:
    cards = [torch.device("cuda", 0), torch.device("cuda", 1)]
    strategy = BigMacStrategy(ranks_per_device=2)
    assert strategy.parallel_devices is None
    strategy.parallel_devices = cards
    assert strategy.parallel_devices == [cards[0], cards[0], cards[1], cards[1]]
    assert strategy.num_processes == 4
    assert BigMacStrategy(parallel_devices=cards, ranks_per_device=3).num_processes == 6


@pytest.mark.parametrize("number", [0, -1, "two"])
def test_refused_numbers_of_ranks(number: object) -> None:
    with pytest.raises(ValueError, match="ranks_per_device="):
        BigMacStrategy(ranks_per_device=number)  # pyright: ignore[reportArgumentType]


def _fit(rank: int) -> tuple[int, dict[str, torch.Tensor]]:
    trainer = pipeline_trainer(1, {"ranks_per_device": 2}, max_steps=2)
    module = ToyModule()
    trainer.fit(module, ToyData(steps=2))
    return trainer.world_size, weights(module)


def test_two_ranks_of_one_device() -> None:
    plain = ToyModule()
    plain_trainer(max_steps=2).fit(plain, ToyData(steps=2))
    for world_size, found in on_ranks(2, _fit):
        assert world_size == 2
        assert_close(found, weights(plain), 2e-6)


def test_nccl_needs_a_card_for_each_rank() -> None:
    refuse_shared(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"ranks 1, 3 have the same card.*process_group_backend to gloo"):
        refuse_shared(["a", "b", "c", "b"])
