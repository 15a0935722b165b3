"""validate, test and predict under the strategy against strategy="auto" in one process."""

from typing import Any

import pytest
import torch

from tests.strategy.trainers import on_ranks, pipeline_trainer, plain_trainer
from tests.toy import ToyData, ToyModule


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
