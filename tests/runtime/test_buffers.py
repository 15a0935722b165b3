"""Running statistics of encoders, which every rank holds and updates with its own items."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bigmac_lightning.runtime.buffers import ReplicatedBuffers
from tests.ranks import run_ranks
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer


class _Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, 1.0]))
        self.register_buffer("still", torch.tensor([7.0]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("positions", torch.arange(3.0), persistent=False)


def _synchronize(rank: int) -> tuple[list[float], int, list[float], list[float]]:
    module: Any = _Tables()
    buffers = ReplicatedBuffers([module, module], None)
    for _ in range(2):  # what was synchronized is no change
        buffers.synchronize()
    if rank < 2:  # the third has no items
        module.mean.add_(rank + 1)
        module.count.add_(rank + 1)
    module.positions.add_(rank)
    buffers.synchronize()
    return module.mean.tolist(), int(module.count), module.still.tolist(), module.positions.tolist()


def test_the_mean_over_ranks_that_have_changed_them() -> None:
    for rank, (mean, count, still, positions) in enumerate(run_ranks(3, _synchronize)):
        assert mean == [2.5, 2.5]
        assert count == 2
        assert still == [7.0]
        assert positions == [rank, rank + 1, rank + 2], "tables are nobody's business"


class _RunningMean(nn.Module):
    """As of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean: Any = self.mean
        if self.training:
            mean.lerp_(x.detach().mean(0), 0.1)
        return x - mean


class _Statistics(ToyModule):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        encoder: Any = self.encoders["image"]
        encoder.tower = nn.ModuleList([_RunningMean(), *encoder.tower])


def _fit(rank: int, dp: int) -> tuple[dict[str, torch.Tensor], int]:
    module = _Statistics(freeze=("encoders",))
    trainer = pipeline_trainer(2 * dp, {"data_parallel_size": dp}, max_epochs=1)
    trainer.fit(module, ToyData(steps=3))
    return dict(module.encoders["image"].named_buffers()), dist.get_rank()


@pytest.mark.parametrize("dp", [1, 2])
def test_running_statistics_stay_equal(dp: int) -> None:
    first, *others = (buffers for buffers, _ in on_ranks(2 * dp, _fit, dp))
    assert first["tower.0.mean"].abs().sum() > 0
    for buffers in others:
        assert all(torch.equal(buffer, first[name]) for name, buffer in buffers.items())
