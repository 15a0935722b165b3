"""Offloaded shards on real GPUs: weights are those of one process on the CPU. test_training.py, test_sharding.py and
tests/runtime/test_second_device.py show the same without a GPU."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from bigmac_lightning import ShardingOptions
from tests.ranks import free_port
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, pipeline_trainer, plain_trainer, weights

ALL = ShardingOptions("fsdp", "fsdp", "zero1", offload=("encoders", "generators", "stages"))


def _fit(rank: int, world: int, port: int, sharding: ShardingOptions, folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in place.items()})
    strategy = {"sharding": sharding, "check_replicas_every": 2}
    trainer = pipeline_trainer(
        world, strategy, accelerator="gpu", max_epochs=1, gradient_clip_val=0.1, accumulate_grad_batches=2
    )
    module = ToyModule(tied=True)
    trainer.fit(module, ToyData())
    for name, parameter in module.named_parameters():
        assert not sharding.offloads(name) or parameter.device.type == "cpu"
    torch.save(module.losses, folder / f"{rank}.losses")
    trainer.save_checkpoint(folder / "saved.ckpt")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "sharding", [ALL, replace(ALL, offload=("encoders",)), replace(ALL, encoders="zero1")], ids=str
)
def test_on_gpus(sharding: ShardingOptions, tmp_path: Path) -> None:
    module, world = ToyModule(tied=True), min(2, torch.cuda.device_count())
    plain_trainer(max_epochs=1, gradient_clip_val=0.1, accumulate_grad_batches=2).fit(module, ToyData())
    mp.spawn(_fit, (world, free_port(), sharding, tmp_path), nprocs=world)  # pyright: ignore
    for rank in range(world):
        assert torch.load(tmp_path / f"{rank}.losses") == pytest.approx(module.losses, rel=1e-4)
    whole = ToyModule.load_from_checkpoint(tmp_path / "saved.ckpt", tied=True, map_location="cpu")
    assert_close(weights(whole), weights(module), 1e-4)
