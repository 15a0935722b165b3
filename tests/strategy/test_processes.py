"""Process groups of a run and their timeouts."""

from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.distributed as dist

from bigmac_lightning.ranks import Ranks
from tests.strategy.trainers import on_ranks, pipeline_trainer
from tests.toy import ToyData, ToyModule


class _Timeouts(pl.Callback):
    """Of every group there is after the first step, by its name."""

    def __init__(self) -> None:
        self.found: dict[str, timedelta] = {}
        self.ranks = Ranks()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ranks.tell(None)()
        for group in dist.distributed_c10d._world.pg_map:
            for device in group._device_types:
                self.found[group.group_name] = group._get_backend(device).options._timeout


def _timeouts(rank: int, world: int, dp: int) -> dict[str, timedelta]:
    dist.destroy_process_group()  # the test's own; Lightning makes another
    timeouts = _Timeouts()
    strategy = {"data_parallel_size": dp, "timeout": timedelta(seconds=77)}
    trainer = pipeline_trainer(world, strategy, max_steps=1, callbacks=[timeouts], limit_val_batches=0)
    trainer.fit(ToyModule(tied=True), ToyData())
    return timeouts.found


@pytest.mark.parametrize(("world", "dp"), [(2, 1), (4, 2)])
def test_every_group_has_the_timeout_of_the_strategy(world: int, dp: int) -> None:
    for found in on_ranks(world, _timeouts, world, dp):
        assert len(found) >= 4
        assert set(found.values()) == {timedelta(seconds=77)}, found
