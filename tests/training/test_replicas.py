"""Ranks that have the same weights compare them: no false alarm, and a single wrong bit is found."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bigmac_lightning import ShardingOptions
from tests.layouts.cases import Case
from tests.layouts.models import Data, module_of
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer

WIDE = pytest.mark.wide
FSDP = ShardingOptions("fsdp", "fsdp", "zero1")
MASTERS = ShardingOptions("fsdp", "zero1", "zero1", master_weights=True)


class _Corrupt(ToyModule):
    """Before the third step, the last rank changes the last bit of one weight; of which one, `name` says."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = name

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and self.trainer.global_rank == self.trainer.world_size - 1 and self.name:
            weight: Any = dict(self.named_parameters())[self.name].data
            weight = weight.to_local() if hasattr(weight, "to_local") else weight
            weight.view(torch.int32).flatten()[0] ^= 1


def _fit(rank: int, world: int, strategy: dict[str, Any], name: str) -> tuple[str, int]:
    precision: Any = "bf16-true" if strategy.get("sharding") is MASTERS else "32-true"
    trainer = pipeline_trainer(world, {"check_replicas_every": 2, **strategy}, max_steps=4, precision=precision)
    module = _Corrupt(name, tied=True)
    try:
        trainer.fit(module, ToyData())
    except ValueError as error:
        return str(error), trainer.global_step
    return "", trainer.global_step


@pytest.mark.parametrize(
    ("world", "strategy", "name", "words"),
    [
        (4, {"data_parallel_size": 2}, "", ""),
        pytest.param(4, {"data_parallel_size": 2}, "llm.layers.3.up.weight", "llm.layers.3.up.weight is", marks=WIDE),
        (2, {}, "llm.head.weight", "tied weights, tensor peer 0: llm.embedding.weight is"),
        (2, {}, "encoders.image.unused.bias", "encoders.image: encoders.image.unused.bias is"),
        (
            4,
            {"data_parallel_size": 2, "sharding": FSDP, "microbatches": 3},
            "generators.sketch.net.0.weight",
            "shard of",
        ),
        (
            4,
            {"data_parallel_size": 2, "sharding": replace(FSDP, offload=("encoders", "stages")), "microbatches": 3},
            "encoders.image.tower.0.weight",
            "shard of",
        ),
        pytest.param(4, {"data_parallel_size": 2, "sharding": MASTERS}, "", "", marks=WIDE),
        pytest.param(
            4, {"data_parallel_size": 2, "sharding": MASTERS}, "encoders.image.unused.bias", "shard of", marks=WIDE
        ),
    ],
)
def test_one_wrong_bit_is_found(world: int, strategy: dict[str, Any], name: str, words: str) -> None:
    for text, steps in on_ranks(world, _fit, world, strategy, name, timeout=90):
        assert words in text
        assert ("on rank" in text) == bool(name)
        assert steps == (2 if name else 4)


def _fit_peers(rank: int, case: Case, corrupt: bool) -> str:
    strategy = {**case.strategy_arguments(), "check_replicas_every": 1}
    trainer = pipeline_trainer(case.world, strategy, max_steps=2, limit_val_batches=0)
    made: Any = module_of(case)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        if corrupt and batch_idx == 1 and rank == 0:
            weight = next(p for n, p in made.named_parameters() if n.startswith("llm.") and "norm" in n)
            weight.data.mul_(1.5)

    made.on_train_batch_start = on_train_batch_start
    try:
        trainer.fit(made, Data(case, 2, 1))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("corrupt", [pytest.param(False, marks=WIDE), True])
def test_what_tensor_peers_share(corrupt: bool) -> None:
    for text in on_ranks(2, _fit_peers, Case((1, 1, 1, 2), "tied"), corrupt, timeout=90):
        assert ("what tensor peers share must be the same, but differs" in text) == corrupt
