"""Gradients accumulated over batches: a mean over batches, or over all that there is to learn from."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from bigmac_lightning import BigMacStrategy, ShardingOptions
from bigmac_lightning.contracts.batch import Batch
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 7


BLOCKS = ShardingOptions("fsdp", "fsdp", "zero1")


class _Merged(ToyData):
    """The batches of an optimizer step as one, for one process that does not accumulate."""

    def __init__(self, windows: list[list[int]], **kwargs: Any) -> None:
        super().__init__(steps=len(windows), **kwargs)
        self.windows = windows

    def collate(self, indices: list[int]) -> Batch:
        window = self.windows[indices[0]] if indices[0] < len(self.windows) else indices  # of validation
        batches = [super(_Merged, self).collate([i]) for i in window]
        return Batch([m for batch in batches for m in batch], self.layout)


def _fit(rank: int, world: int, strategy: dict[str, Any], trainer: dict[str, Any]) -> dict[str, torch.Tensor]:
    module = ToyModule(optimizer="sgd", lr=0.05)
    found = pipeline_trainer(world, {"accumulate": "tokens", **strategy}, max_epochs=1, **trainer)
    found.fit(module, ToyData(steps=STEPS, microbatches=4, text_only=(0, 2)))
    return weights(module)


@pytest.mark.parametrize(
    ("world", "strategy", "trainer", "windows"),
    [
        (2, {}, {"accumulate_grad_batches": 3}, [[0, 1, 2], [3, 4, 5], [6]]),
        (1, {}, {"accumulate_grad_batches": 2}, [[0, 1], [2, 3], [4, 5], [6]]),
        (4, {"data_parallel_size": 2, "sharding": BLOCKS}, {"accumulate_grad_batches": 3}, [[0, 1, 2], [3, 4, 5], [6]]),
        (2, {}, {"accumulate_grad_batches": 4, "limit_train_batches": 6}, [[0, 1, 2, 3], [4, 5]]),
        (2, {"backbone": "zb1p"}, {"accumulate_grad_batches": 3, "max_steps": 2}, [[0, 1, 2], [3, 4, 5]]),
        (2, {}, {"accumulate_grad_batches": 1}, [[i] for i in range(STEPS)]),
    ],
)
def test_tokens_count_as_in_one_large_batch(
    world: int, strategy: dict[str, Any], trainer: dict[str, Any], windows: list[list[int]]
) -> None:
    module = ToyModule(optimizer="sgd", lr=0.05)
    replicas = strategy.get("data_parallel_size", 1)
    data = _Merged(windows, microbatches=4, text_only=(0, 2), replicas=replicas)
    plain_trainer(max_epochs=1).fit(module, data)
    for found in on_ranks(world, _fit, world, strategy, trainer):
        assert_close(found, weights(module), 2e-6)
    if trainer["accumulate_grad_batches"] > 1:
        other = on_ranks(world, _fit, world, {**strategy, "accumulate": "batches"}, trainer)[0]
        with pytest.raises(AssertionError):
            assert_close(other, weights(module), 1e-3)


def _schedule(rank: int) -> list[int]:
    windows: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
            assert batch.step_counts is not None
            windows.append(round(batch.step_counts[0] / pl_module.counts(batch)[0]))

    accumulation = GradientAccumulationScheduler({0: 1, 1: 3})
    strategy = {"accumulate": "tokens"}
    trainer = pipeline_trainer(2, strategy, max_epochs=2, callbacks=[accumulation, Watch()])
    trainer.fit(ToyModule(), _Alike(steps=4))
    return windows


class _Alike(ToyData):
    """The same batch again and again."""

    def collate(self, indices: list[int]) -> Batch:
        return super().collate([0])


def test_a_schedule_of_accumulation() -> None:
    for windows in on_ranks(2, _schedule):
        assert windows == [1] * 4 + [3, 3, 3, 1]


class _Numbers(torch.utils.data.IterableDataset):
    """Endless indices of batches, from wherever it is told."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Any:
        while self.next < STEPS:
            self.next += 1
            yield self.next - 1


class _Stateful(torch.utils.data.DataLoader):
    dataset: _Numbers

    def __len__(self) -> int:
        return STEPS  # else Lightning itself reads a batch ahead, and forgets it

    def state_dict(self) -> dict[str, int]:
        return {"next": self.dataset.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.dataset.next = state["next"]


class _Resumable(ToyData):
    def train_dataloader(self) -> Any:
        return _Stateful(_Numbers(), batch_size=1, collate_fn=self.collate)


def _resumed(rank: int, folder: Path, stop: int | None) -> list[float]:
    checkpoint = ModelCheckpoint(folder / f"from {stop}", every_n_train_steps=1, save_top_k=-1)
    arguments: dict[str, Any] = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "callbacks": [checkpoint]}
    module = ToyModule()
    trainer = pipeline_trainer(2, {"accumulate": "tokens"}, max_epochs=1, limit_val_batches=0, **arguments)
    path = None if stop is None else next(folder.glob(f"from None/*step={stop}.ckpt"))
    trainer.fit(module, _Resumable(), ckpt_path=path)
    return module.losses


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("stop", [1, 2])
def test_what_was_read_ahead_comes_again_after_resuming(tmp_path: Path, stop: int) -> None:
    whole = on_ranks(2, _resumed, tmp_path, None)
    resumed = on_ranks(2, _resumed, tmp_path, stop)
    for losses, rest in zip(whole, resumed, strict=True):
        assert len(losses) == STEPS
        assert rest == losses[2 * stop :]


def test_arguments() -> None:
    with pytest.raises(ValueError, match='accumulate=\'words\': choose "batches" or "tokens"'):
        BigMacStrategy(accumulate="words")  # type: ignore[arg-type]
