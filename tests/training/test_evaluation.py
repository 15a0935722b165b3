"""validate, test and predict under the strategy against strategy="auto" in one process."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.datamodules import Collator
from tests.models import parts
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer


def _evaluate(trainer: Any) -> tuple[dict[str, float], dict[str, float], list[list[torch.Tensor]]]:
    module, data = ToyModule(tied=True), ToyData(microbatches=5, text_only=(1, 2))
    (validated,) = trainer.validate(module, data, verbose=False)
    (tested,) = trainer.test(module, data, verbose=False)
    predicted = trainer.predict(module, data)
    assert all(parameter.grad is None for parameter in module.parameters())
    return validated, tested, predicted


def _on_rank(rank: int, world: int, strategy: dict[str, Any]) -> Any:
    return _evaluate(pipeline_trainer(world, strategy))


@pytest.mark.parametrize(
    ("world", "strategy"),
    [
        (1, {}),
        (2, {}),
        (3, {"policy": "upfront", "group_size": 2}),
        (4, {"policy": "first_stage"}),
        (4, {"policy": "disaggregated"}),
        (2, {"backbone": "interleaved_1f1b", "virtual_stages": 2}),
        (2, {"backbone": "dualpipev", "virtual_stages": 2}),
        (2, {"backbone": "gpipe", "microbatches": 2}),  # a training batch must have 2; evaluation takes what is there
    ],
)
def test_against_auto(world: int, strategy: dict[str, Any]) -> None:
    validated, tested, predicted = _evaluate(plain_trainer())
    assert 0 < tested["val/accuracy"] < 1
    assert any(predicted), "nothing was sampled"
    for found in on_ranks(world, _on_rank, world, strategy):
        assert found[0] == pytest.approx(validated, rel=1e-5)
        assert found[1] == pytest.approx(tested, rel=1e-5)
        assert len(found[2]) == len(predicted) == 2
        for batch, expected in zip(found[2], predicted, strict=True):
            assert len(batch) == len(expected)
            for sample, other in zip(batch, expected, strict=True):
                torch.testing.assert_close(sample, other, rtol=1e-5, atol=1e-6)


def _fit_test_fit(trainer: Any) -> tuple[dict[str, float], list[float]]:
    """One trainer used again and again, as in notebooks."""
    module, data = ToyModule(), ToyData(steps=3)
    trainer.fit(module, data)
    (tested,) = trainer.test(module, data, verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    return tested, module.losses


def _fit_test_fit_on_rank(rank: int) -> tuple[dict[str, float], list[float]]:
    return _fit_test_fit(pipeline_trainer(2, max_epochs=1))


def test_one_trainer_for_everything() -> None:
    tested, losses = _fit_test_fit(plain_trainer(max_epochs=1))
    assert len(losses) == 6
    for found_tested, found_losses in on_ranks(2, _fit_test_fit_on_rank):
        assert found_tested == pytest.approx(tested, rel=1e-5)
        assert found_losses == pytest.approx(losses, rel=1e-5)


class _Unlabelled(ToyData):
    """Batches of which nothing can be learnt or made, as of prompts alone."""

    def collate(self, indices: list[int]) -> Batch:
        batch = super().collate(indices)
        nothing = torch.empty(0, dtype=torch.long)
        for microbatch in batch:
            microbatch.labels = microbatch.label_positions = microbatch.target_positions = nothing
            microbatch.targets = []
        return batch


def _evaluate_unlabelled(trainer: Any) -> tuple[list[int], list[Any], float]:
    module, data, shapes = ToyModule(), _Unlabelled(), list[int]()

    class Watch(pl.Callback):
        def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *rest: Any) -> None:
            out = pl_module.pipeline(batch)
            shapes.append(len(out.predictions))

    trainer.callbacks.append(Watch())
    trainer.test(_NoAccuracy(), data, verbose=False)
    return shapes, trainer.predict(module, data), float(trainer.callback_metrics.get("val/loss", 0.0))


class _NoAccuracy(ToyModule):
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        out = self.pipeline(batch)
        assert out.predictions is not None
        self.log("val/loss", out.loss, batch_size=1, sync_dist=True)


def _evaluate_unlabelled_on_rank(rank: int) -> Any:
    return _evaluate_unlabelled(pipeline_trainer(2))


def test_batches_without_labels_and_targets() -> None:
    for found in [_evaluate_unlabelled(plain_trainer()), *on_ranks(2, _evaluate_unlabelled_on_rank)]:
        assert found == ([0, 0, 0], [[], []], 0.0)


class _Ragged(ToyData):
    """The first replica validates on one batch, the second on three."""

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        replica = self.trainer.strategy.pipeline_layout and self.trainer.strategy.mesh.dp_rank  # type: ignore[attr-defined]
        return self.loader(1 + 2 * replica, first=1000)


class _Means(ToyModule):
    """Weighs each batch by what is in it, and reduces at the end alone, as torchmetrics do."""

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        out = self.pipeline(batch)
        labels = len(batch.labels)
        self.sums += torch.tensor([float(out.metrics["text"]) * labels, labels])


def _validate_ragged(rank: int, start: type[ToyModule]) -> list[float]:
    module = start()
    pipeline_trainer(4, {"data_parallel_size": 2}).validate(module, _Ragged(), verbose=False)
    return module.sums.tolist()  # type: ignore[union-attr]


def test_replicas_with_different_numbers_of_batches() -> None:
    """Nothing waits for a batch that another replica does not have."""
    ranks = on_ranks(4, _validate_ragged, _Means, timeout=60)
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    assert ranks[0][1] < ranks[2][1]


def _validated(trainer: Any, layout: PipelineLayout) -> dict[str, float]:
    """Of a model that has learnt three of six samples by heart."""
    torch.manual_seed(0)
    samples = parts.samples("rtdrtd")
    module = parts.model(learning_rate=1e-2, schedule="constant")
    given, learnt = (Collator(layout, 3)(some) for some in (samples, samples[:3]))
    loaders: list[Any] = [DataLoader([batch], batch_size=None) for batch in (learnt, given)]  # pyright: ignore
    trainer.fit(module, loaders[0])
    (found,) = trainer.validate(module, loaders[1], verbose=False)
    return found


def _validated_on_rank(rank: int) -> dict[str, float]:
    trainer = pipeline_trainer(2, {}, max_epochs=25, limit_val_batches=1)
    return _validated(trainer, PipelineLayout(2, rank, group_size=2))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_exact_match_in_a_pipeline() -> None:
    expected = _validated(plain_trainer(max_epochs=25, limit_val_batches=1), PipelineLayout())
    assert 0 < expected["val/exact_match"] < 1
    for found in on_ranks(2, _validated_on_rank):
        assert found["val/exact_match"] == expected["val/exact_match"]
        assert found["val/accuracy"] == pytest.approx(expected["val/accuracy"])
