from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.datamodules import EpochSampler, PipelineDataModule, PipelineDataset, Sample


class Squares(PipelineDataset):
    """Sample (epoch, index) has these two as tokens."""

    def __len__(self) -> int:
        return 10

    def sample(self, epoch: int, index: int) -> Sample:
        return Sample([epoch, index], [False, True])


def module(strategy: Any = None, replicas: dict[str, int] | None = None, **arguments: Any) -> PipelineDataModule:
    made = PipelineDataModule(**{"batch_size": 4, "microbatches": 3, **arguments})
    made.trainer = SimpleNamespace(strategy=strategy, distributed_sampler_kwargs=replicas)  # pyright: ignore
    return made


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def order(data: PipelineDataModule, epoch: int = 0, shuffle: bool = True) -> list[list[int]]:
    loader = data.loader(Squares(), shuffle)
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)
    batches = [torch.cat([m.inputs["input_ids"] for m in batch.microbatches]) for batch in loader]
    assert all((batch[:, 0] == epoch).all() for batch in batches)
    return [batch[:, 1].tolist() for batch in batches]


def test_without_a_trainer() -> None:
    data = PipelineDataModule(batch_size=4, microbatches=3)
    assert data.layout == PipelineLayout()
    assert [len(batch) for batch in data.loader(Squares())] == [3, 3, 2]
    assert order(data, shuffle=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_order_depends_on_seed_and_epoch() -> None:
    assert order(module()) == order(module(num_workers=0)) == order(module(replicas={"num_replicas": 1, "rank": 0}))
    assert order(module()) != order(module(), epoch=1)
    assert order(module()) != order(module(seed=1))
    assert sorted(flat(order(module()))) == list(range(10))


def test_replicas_share_an_epoch() -> None:
    shares = [flat(order(module(replicas={"num_replicas": 2, "rank": r}))) for r in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(10))
    every = flat(order(module()))
    assert shares == [every[0::2], every[1::2]]


def test_workers_get_the_epoch() -> None:
    assert order(module(num_workers=1), epoch=3) == order(module(), epoch=3)


@pytest.mark.parametrize(("asked", "expected"), [(None, 3), (2, 2)])
def test_the_strategy_says_the_place_in_the_pipeline(asked: int | None, expected: int) -> None:
    layout = PipelineLayout(2, 1, 2, microbatches=asked)
    data = module(SimpleNamespace(pipeline_layout=layout))
    assert data.layout is layout
    batch = next(iter(data.loader(Squares())))
    assert batch.layout is layout
    assert len(batch) == expected
    assert module(SimpleNamespace()).layout == PipelineLayout()


def test_other_samplers_ask_by_index() -> None:
    assert Squares()[4].tokens == [0, 4]
    assert Squares()[2, 4].tokens == [2, 4]


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"microbatches": 0}])
def test_sizes_that_make_no_sense(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must both be at least 1"):
        module(**arguments)
