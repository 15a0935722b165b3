"""The table of the model that Lightning prints before a training: that of the whole model in one process."""

import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary

from bigmac_lightning import ShardingOptions
from tests.layouts.cases import Case
from tests.layouts.models import Data, module_of
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

FSDP = ShardingOptions("fsdp", "fsdp", "fsdp")
ALTERNATING = {"backbone": "interleaved_1f1b", "virtual_stages": 2}


class Table(ModelSummary):
    """Keeps what Lightning's own would print, on the rank that would print it."""

    def __init__(self, max_depth: int) -> None:
        super().__init__(max_depth)
        self.printed: list[tuple[Any, ...]] = []

    def summarize(self, *found: Any, total_flops: int, **_: Any) -> None:  # type: ignore[override]
        self.printed.append((*found, total_flops))


class _Toy(ToyModule):
    """Its frozen layers are in eval mode."""

    def configure_model(self) -> None:
        super().configure_model()
        for name, child in self.named_modules():
            if name in self.freeze_names:
                child.eval()


Made = Callable[[], tuple[pl.LightningModule, pl.LightningDataModule]]
"""A function that makes a model and its data."""


def _toy(**options: Any) -> Made:
    return lambda: (_Toy(**options), ToyData(steps=1))


def _real(case: Case) -> Made:
    return lambda: (module_of(case), Data(case, 1, 1))


RUNS: dict[str, tuple[int, dict[str, Any], Made]] = {
    "P2": (2, {}, _toy()),
    "P2, tied": (2, {}, _toy(tied=True)),
    "P3, frozen": (3, {}, _toy(tied=True, freeze=["encoders.image", "llm.layers.3", "llm.embedding", "llm.head"])),
    "P2, every other layer": (2, ALTERNATING, _toy()),
    "P2 x dp2": (4, {"data_parallel_size": 2}, _toy(tied=True)),
    "P2 x dp2, fsdp": (4, {"data_parallel_size": 2, "sharding": FSDP, "microbatches": 3}, _toy()),
    "dp2, fsdp": (2, {"data_parallel_size": 2, "sharding": FSDP, "microbatches": 3}, _toy()),
    "one process": (1, {}, _toy(tied=True)),
    "P2, adapters": (2, {}, _real(Case((1, 2, 1, 1), "tied", frozen="LLM but adapters"))),
    "P2 x tp2": (4, {"tensor_parallel_size": 2}, _real(Case((1, 2, 1, 2), "tied"))),
    "P2 x ep2": (
        4,
        {"tensor_parallel_size": 2, "expert_parallel_size": 2},
        _real(Case((1, 2, 1, 2), "spread experts")),
    ),
}


def _tables(make_trainer: Callable[..., pl.Trainer], name: str) -> list[tuple[Any, ...]]:
    """What is printed of each depth."""
    callbacks = [Table(1), Table(3), Table(-1), Table(0)]
    trainer = make_trainer(callbacks=callbacks, enable_model_summary=True, max_steps=1, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
        trainer.fit(*RUNS[name][2]())
    assert all("_summary" not in vars(callback) for callback in callbacks), "the next run would print this model"
    return [printed for callback in callbacks for printed in callback.printed]


def _on_rank(rank: int, name: str) -> list[tuple[Any, ...]]:
    world, strategy, _ = RUNS[name]
    return _tables(lambda **options: pipeline_trainer(world, strategy, **options), name)


def _without_shards(table: tuple[Any, ...]) -> tuple[Any, ...]:
    """The table without the prefix that torch gives to classes of modules in shards."""
    columns, *rest = table
    return [(title, [text.removeprefix("FSDP") for text in texts]) for title, texts in columns], *rest


@pytest.mark.parametrize("name", RUNS)
def test_as_in_one_process(name: str) -> None:
    alone = _tables(plain_trainer, name)
    module: Any = RUNS[name][2]()[0]
    module.configure_model()
    numbers = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    first, *others = on_ranks(RUNS[name][0], _on_rank, name)
    assert [table[1:3] for table in first] == [(numbers, trained)] * 3
    assert [_without_shards(table) for table in first] == alone
    assert not any(others), "rank 0 prints"


def _printed(make_trainer: Callable[..., pl.Trainer], kind: type[ModelSummary]) -> str:
    """The text that Lightning's own callbacks print."""
    said, logger = StringIO(), logging.getLogger("lightning.pytorch.callbacks.model_summary")
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        with redirect_stdout(said):
            trainer = make_trainer(callbacks=[kind(2)], enable_model_summary=True, max_steps=1, limit_val_batches=0)
            trainer.fit(ToyModule(tied=True), ToyData(steps=1))
    finally:
        logger.removeHandler(handler)
    return said.getvalue()


def _print_on_rank(rank: int, kind: type[ModelSummary]) -> str:
    return _printed(lambda **options: pipeline_trainer(2, **options), kind)


@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_lightnings_own_tables(kind: type[ModelSummary]) -> None:
    alone = _printed(plain_trainer, kind)
    assert "llm.layers" in alone
    assert on_ranks(2, _print_on_rank, kind) == [alone, ""]


class _Own(ModelSummary):
    """Chooses itself what it shows."""

    shown: list[int]

    def _summary(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        self.shown = [sum(p.numel() for p in pl_module.parameters())]
        return super()._summary(trainer, pl_module)


def _with_callbacks_of_some_ranks(rank: int) -> bool:
    """Rank 1 has no table, and no rank has one in the second run."""
    own = _Own()
    for tables in ([own, Table(1)] if rank == 0 else [], []):
        options = {"callbacks": tables, "enable_model_summary": bool(tables)}
        trainer = pipeline_trainer(2, max_steps=1, limit_val_batches=0, **options)
        trainer.fit(ToyModule(), ToyData(steps=1))
    return rank > 0 or own.shown[0] > 0


def test_ranks_with_other_callbacks_do_not_wait() -> None:
    assert on_ranks(2, _with_callbacks_of_some_ranks, timeout=60) == [True, True]
