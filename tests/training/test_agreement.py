"""One rank that differs: the error names it and the key, on all ranks, before a step."""

import logging
import time
import unittest
from typing import Any

import pytest

from bigmac_lightning import Batch
from bigmac_lightning.training.agreement import message
from tests.toy import ToyData, ToyModule, toy_batch
from tests.training.trainers import on_ranks, pipeline_trainer


class _Labels(ToyData):
    """From the third batch on, one label is another on the last rank."""

    key = "labels"

    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        trainer: Any = self.trainer
        if indices[0] >= 2 and trainer.global_rank == trainer.world_size - 1:
            self.change(batch)
        return batch

    def change(self, batch: Batch) -> None:
        batch.microbatches[2].labels[0] = (batch.microbatches[2].labels[0] + 1) % 7


class _Tokens(_Labels):
    key = "input_ids"

    def change(self, batch: Batch) -> None:
        batch.microbatches[2].inputs["input_ids"][0, 1] ^= 1


class _Items(_Labels):
    key = "media"

    def change(self, batch: Batch) -> None:
        batch.microbatches[0].media[0].cost += 1.0


class _Fewer(_Labels):
    key = "microbatches"

    def change(self, batch: Batch) -> None:
        del batch.microbatches[2]


class _Order(_Labels):
    key = "input_ids"

    def change(self, batch: Batch) -> None:
        batch.microbatches = super(_Labels, self).collate([7]).microbatches


class _Refused(_Labels):
    key = "microbatch 1: a media item has the cost nan: it must be a finite number"

    def change(self, batch: Batch) -> None:
        batch.microbatches[1].media[0].cost = float("nan")


class _Validation(ToyData):
    """The last rank has a validation batch more."""

    def val_dataloader(self) -> Any:
        trainer: Any = self.trainer
        return self.loader(2 + (trainer.global_rank == trainer.world_size - 1), first=1000)


def _fit(rank: int, world: int, change: str, value: Any, replicas: int = 1) -> tuple[str, int, float]:
    """Train two steps, with something else on the last rank."""
    strategy: dict[str, Any] = {"data_parallel_size": replicas}
    module: dict[str, Any] = {}
    trainer: dict[str, Any] = {"max_steps": 6, "val_check_interval": 3}
    data: dict[str, Any] = {}
    if rank == world - 1:
        {"strategy": strategy, "module": module, "trainer": trainer, "data": data}[change.partition(".")[0]][
            change.partition(".")[2]
        ] = value
    start = time.monotonic()
    made = pipeline_trainer(world, strategy, **trainer)
    try:
        made.fit(ToyModule(**module), data.pop("kind", ToyData)(**data))
    except (ValueError, TypeError) as error:
        return str(error), made.global_step, time.monotonic() - start
    return "no error", made.global_step, 0.0


@pytest.mark.parametrize(
    ("change", "value", "words"),
    [
        ("strategy.backbone", "gpipe", ["strategy: schedule.backbone is '1f1b' on rank 0, 'gpipe' on rank 1"]),
        ("strategy.pipeline_parallel_size", 1, ["pipeline_parallel_size is 'auto' on rank 0, 1 on rank 1"]),
        ("module.layers", 6, ["model: llm.num_layers is 4 on rank 0, 6 on rank 1"]),
        ("module.lr", 0.5, ["optimizer: optimizer 0 lr is 0.01 on rank 0, 0.5 on rank 1"]),
        ("trainer.gradient_clip_val", 0.5, ["trainer: gradient_clip_val is None on rank 0, 0.5 on rank 1"]),
        ("trainer.precision", "bf16-mixed", ["trainer: precision is 32-true", "bf16-mixed"]),
        ("data.steps", 5, ["training: training batches of an epoch is 20 on rank 0, 5 on rank 1"]),
    ],
)
def test_settings_of_another_rank_are_named(change: str, value: Any, words: list[str]) -> None:
    for text, steps, _ in on_ranks(2, _fit, 2, change, value, timeout=60):
        assert all(word in text for word in words), text
        assert steps == 0


@pytest.mark.parametrize("kind", [_Labels, _Tokens, _Items, _Fewer, _Order])
def test_another_batch_on_one_rank_is_named(kind: type[_Labels]) -> None:
    for text, steps, _ in on_ranks(2, _fit, 2, "data.kind", kind, timeout=60):
        assert "the batch of a pipeline must be the same on all ranks, but differ" in text
        assert kind.key in text
        assert "on rank 0" in text
        assert "on rank 1" in text
        assert steps == 2


def test_a_batch_that_one_rank_refuses() -> None:
    for text, steps, _ in on_ranks(2, _fit, 2, "data.kind", _Refused, timeout=60):
        assert _Refused.key in text
        assert steps == 2


def test_another_number_of_validation_batches() -> None:
    for text, *_ in on_ranks(2, _fit, 2, "data.kind", _Validation, timeout=60):
        assert "pipeline 0: num_val_batches is [2] on rank 0, [3] on rank 1" in text


class _Everyone(ToyData):
    """It gives all pipelines the same samples."""

    def collate(self, indices: list[int]) -> Batch:
        return toy_batch(3, self.layout, seed=indices[0])


def _fit_the_same(rank: int) -> list[str]:
    with unittest.TestCase().assertLogs("bigmac_lightning") as logs:
        pipeline_trainer(2, {"data_parallel_size": 2}, max_steps=2).fit(ToyModule(), _Everyone())
        logging.getLogger("bigmac_lightning").warning("the end")
    return logs.output


def test_pipelines_with_the_same_data_are_warned_of() -> None:
    first, other = on_ranks(2, _fit_the_same, timeout=60)
    assert sum("Some pipelines have the same first batch" in line for line in first) == 1
    assert not any("the same first batch" in line for line in other), "rank 0 alone"


def _fit_unequal(rank: int, when: str) -> str:
    strategy: dict[str, Any] = {"check_batches": when}
    try:
        pipeline_trainer(2, strategy, max_steps=4).fit(ToyModule(), _Labels())
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.wide
@pytest.mark.parametrize("when", ["first", "never"])
def test_batches_that_are_not_compared(when: str) -> None:
    assert on_ranks(2, _fit_unequal, when, timeout=60) == ["no error"] * 2


@pytest.mark.wide
@pytest.mark.parametrize(
    ("change", "value", "word"),
    [
        ("data.kind", _Labels, "pipeline 1: microbatch 2 labels is"),
        ("module.lr", 0.5, "optimizer 0 lr is 0.5 on rank 3, 0.01 on ranks 0, 1, 2"),
        ("strategy.accumulate", "tokens", "strategy: accumulate is 'tokens' on rank 3, 'batches' on ranks 0, 1, 2"),
        ("strategy.tensor_parallel_size", 2, "strategy: parallel.tensor is 2 on rank 3, 1 on ranks 0, 1, 2"),
    ],
)
def test_one_of_four_ranks(change: str, value: Any, word: str) -> None:
    """The other pipeline's ranks end as well."""
    for text, *_ in on_ranks(4, _fit, 4, change, value, 2, timeout=60):
        assert word in text


def test_facts_that_differ() -> None:
    rows = [{"trainer": {"max_steps": "5", "lr": "1"}}] * 3 + [{"trainer": {"max_steps": "6"}}]
    text = message(rows, "settings")
    assert "trainer: max_steps is 6 on rank 3, 5 on ranks 0, 1, 2" in text
    assert "trainer: lr is missing on rank 3, 1 on ranks 0, 1, 2" in text
