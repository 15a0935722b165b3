"""A short training is measured, and later runs plan from its times: the same ones, or scaled, or refused."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from bigmac_lightning import ShardingOptions
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.schedule.measured_costs import MeasuredCosts
from bigmac_lightning.training.profiling import Profiling
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights


def _profile(rank: int, file: str, strategy: dict[str, Any], module: dict[str, Any]) -> Any:
    profiling = Profiling()
    trainer = pipeline_trainer(2, strategy, max_epochs=1, limit_val_batches=0, callbacks=[profiling])
    trainer.fit(ToyModule(**module), ToyData(steps=5))
    assert profiling.found is not None
    if rank == 0:
        profiling.found.save(file)
    return profiling.found


class _Watch(pl.Callback):
    """The times that each batch was planned with, and what its plan says."""

    def __init__(self) -> None:
        self.rates: list[Any] = []
        self.costs: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        runner = trainer.strategy.runner
        self.rates.append(runner.planner.rates)
        self.costs.append(runner.last_plan.costs)


def _fit(rank: int, world: int, strategy: dict[str, Any], module: dict[str, Any], trainer: dict[str, Any]) -> Any:
    watch, trained = _Watch(), ToyModule(**module)
    made = pipeline_trainer(world, strategy, max_epochs=1, limit_val_batches=0, callbacks=[watch], **trainer)
    with warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("always", "The costs of the file")
        made.fit(trained, ToyData(steps=3))
    made.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    return weights(trained), watch.rates, watch.costs, [str(warning.message) for warning in warned]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, MeasuredCosts]:
    file = str(tmp_path_factory.mktemp("costs") / "costs.json")
    found = on_ranks(2, _profile, file, {}, {"tied": True})
    assert found[0] == found[1], "ranks have agreed"
    return file, found[0]


def test_what_is_measured(measured: tuple[str, MeasuredCosts]) -> None:
    file, found = measured
    assert MeasuredCosts.load(file) == found
    assert {kind for kind, _ in found.rates} == {"F", "B", "EF", "EB", "G"}
    assert (found.pipeline_parallel_size, len(found.layers)) == (2, 2)
    assert found.trained[0] == "llm"
    assert found.trained[-1] == "generators"
    for name in ("message", "optimizer", "reduction", "encoder_unit", "llm_microbatch"):
        assert getattr(found, name), name
    assert found.peak is None
    assert found.left_out[0] == "peak: only CUDA counts the bytes that are allocated on a device"
    assert found.work.tokens == found.work.llm > 0, "the cost of a microbatch is its tokens"
    assert found.work.items
    assert found.work.targets


def _plain(module: dict[str, Any]) -> Any:
    expected = ToyModule(**module)
    plain_trainer(max_epochs=1, limit_val_batches=0).fit(expected, ToyData(steps=3))
    return weights(expected)


def test_plans_are_made_from_the_first_batch_on(measured: tuple[str, MeasuredCosts]) -> None:
    file, known = measured
    found = on_ranks(2, _fit, 2, {"costs": file, "policy": "filled"}, {"tied": True}, {})
    for trained, rates, costs, warned in found:
        assert_close(trained, _plain({"tied": True}), 1e-5)
        assert rates == [known.rates] * 3
        assert not [text for text in warned if "costs" in text]
        assert pytest.approx(known.costs(2).F, rel=0.5) == costs[0].F, "in seconds"
        assert costs[0].latency == pytest.approx(known.message, rel=0.5)


@pytest.mark.parametrize(
    ("strategy", "stages"),
    [
        ({"backbone": "interleaved_1f1b", "virtual_stages": 2, "partition": "auto"}, 4),
        ({"partition": [1, 3], "sharding": ShardingOptions(encoders="fsdp", generators="zero1")}, 2),
    ],
)
def test_times_are_spread_over_other_stages(
    strategy: dict[str, Any], stages: int, measured: tuple[str, MeasuredCosts]
) -> None:
    file, known = measured
    found = on_ranks(2, _fit, 2, {"costs": file, **strategy}, {"tied": True}, {})
    for trained, rates, *_ in found:
        assert_close(trained, _plain({"tied": True}), 1e-5)
        assert {stage for kind, stage in rates[0] if kind == "F"} == set(range(stages))
        whole = sum(rate.mean for (kind, _), rate in rates[0].items() if kind == "F")
        assert whole == pytest.approx(sum(rate.mean for (kind, _), rate in known.rates.items() if kind == "F"))


def test_times_of_other_weights_are_not_used(measured: tuple[str, MeasuredCosts]) -> None:
    file, known = measured
    _, rates, costs, warned = on_ranks(1, _fit, 1, {"costs": file}, {"tied": True, "freeze": ["generators"]}, {})[0]
    assert any("of the file were measured with these trained: llm, encoders.audio, " in text for text in warned), warned
    assert rates == [None] * 3
    assert pytest.approx(known.costs(1).F) == costs[0].F, "their ratios are used"


@pytest.mark.parametrize(
    ("module", "trainer", "message"),
    [
        ({"tied": False}, {}, "costs.json: the model .or which of its weights are trained. differs"),
        ({"tied": True}, {"precision": "bf16-mixed"}, "precision differs: it was 32-true, and is bf16-mixed here"),
    ],
)
def test_costs_of_something_else_are_refused(
    measured: tuple[str, MeasuredCosts], module: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        on_ranks(1, _fit, 1, {"costs": measured[0]}, module, trainer)


def test_a_file_is_read_before_processes_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.json: cannot be read"):
        pipeline_trainer(1, {"costs": str(tmp_path / "nowhere.json")})
