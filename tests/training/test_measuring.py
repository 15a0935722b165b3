"""Times of actions that a training measures, and the plans that it makes from them."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from bigmac_lightning import Costs, ShardingOptions
from bigmac_lightning.callbacks import PipelineMonitor
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.schedule.rates import Rate, Rates
from bigmac_lightning.training.work import SharedRates, guessed, measured
from tests.schedule.pages import data_of
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

COSTS = Costs(F=2, B=4, EF=3, EB=5, G=7, latency=0.5)
LLM = [1.0, 3.0, 2.0]
MEDIA = [[(0, 2.0)], [], [(1, 4.0), (0, 1.0)]]
TARGETS = [[], [(1, 6.0)], [(0, 3.0)]]


def _rates(second: float) -> Rates:
    """What would be measured if the guesses were true, and their unit took so many seconds."""
    media, targets = second * COSTS.EF / (7 / 3), second * COSTS.G / 3
    rates: dict[Any, Rate] = {("EF", None): Rate(0, media, 1), ("EB", None): Rate(0, media * 5 / 3, 1)}
    rates["G", None] = Rate(0, targets, 1)
    for stage in (0, 1):
        rates |= {(kind, stage): Rate(0, second * getattr(COSTS, kind) / 2, 1) for kind in ("F", "B")}
    return rates


def test_true_guesses_stay_as_they_are() -> None:
    guess = guessed(COSTS, None, LLM, MEDIA, TARGETS)
    work = measured(guess, _rates(0.25), 1, LLM, MEDIA, TARGETS, 1)
    for kind in ("F", "B", "I", "W", "EF", "EB", "G", "latency"):
        assert getattr(work.costs, kind) == pytest.approx(0.25 * getattr(COSTS, kind)), kind
    assert work.llm == pytest.approx(guess.llm)
    for found, wanted in ((work.media, guess.media), (work.targets, guess.targets)):
        times = [[(owner, pytest.approx(0.25 * time)) for owner, time in row] for row in wanted]
        assert [list(row) for row in found] == times


def test_what_was_measured_replaces_guesses() -> None:
    rates: dict[Any, Rate] = {**_rates(1.0), ("F", 1): Rate(1.0, 0.0, 1.0), ("EF", None): Rate(0.5, 1.0, 1.0)}
    del rates["G", None]
    work = measured(guessed(COSTS, None, LLM, MEDIA, TARGETS), rates, 1, LLM, MEDIA, TARGETS, 2)
    assert work.stage_costs is not None
    assert [row[0] for row in work.stage_costs] == pytest.approx([2.0, 1.0])
    assert [list(row) for row in work.media] == [[(0, 1.25)], [], [(1, 2.25), (0, 0.75)]], "of two peers"
    assert pytest.approx(7 * 3 / 4) == work.costs.G, "as long as guessed, beside forwards that take 3 and not 4"
    frozen = replace(COSTS, EB=0.0)
    assert measured(guessed(frozen, None, LLM, MEDIA, TARGETS), rates, 1, LLM, MEDIA, TARGETS, 1).costs.EB == 0


def test_rates_in_shared_memory() -> None:
    shared = SharedRates(2)
    assert shared.get() is None
    shared.set(_rates(0.1))
    assert shared.get() == _rates(0.1)
    shared.set(None)
    assert shared.get() is None


class _Slow(ToyModule):
    """Encoders take some milliseconds for each media item."""

    def configure_model(self) -> None:
        super().configure_model()
        for encoder in self.encoders.values():
            encoder.register_forward_pre_hook(lambda _, given: time.sleep(0.004 * len(given[0])))


class _Watch(pl.Callback):
    """Which batches ran the plan that came with them, and what plans were made from."""

    def __init__(self) -> None:
        self.ran: list[bool] = []
        self.rates: list[Any] = []
        self.costs: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        planned: Any = batch.planned
        self.ran.append(planned is not None and trainer.strategy.runner.last_plan is planned.plan)
        self.costs = planned.plan.costs
        self.rates.append(trainer.strategy.runner.planner.rates)


class _InWorkers(ToyData):
    def loader(self, steps: int, first: int = 0) -> torch.utils.data.DataLoader[Any]:
        options: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 1}
        return torch.utils.data.DataLoader(
            range(first, first + steps), batch_size=1, collate_fn=self.collate, **options
        )


def _fit(rank: int, strategy: dict[str, Any], folder: Path | None = None) -> Any:
    watch, module = _Watch(), _Slow(tied=True, optimizer="sgd")
    monitor = PipelineMonitor(trace_step=None if folder is None else 15, dirpath=str(folder))
    trainer = pipeline_trainer(2, strategy, max_epochs=1, callbacks=[watch, monitor])
    trainer.fit(module, _InWorkers(steps=16))
    return weights(module), watch.ran, watch.rates, watch.costs


@pytest.mark.parametrize("policy", ["filled", "recompute"])
def test_plans_are_made_from_measured_times(policy: str, tmp_path: Path) -> None:
    expected = ToyModule(tied=True, optimizer="sgd")
    plain_trainer(max_epochs=1).fit(expected, ToyData(steps=16))
    found = on_ranks(2, _fit, {"policy": policy}, tmp_path)
    for trained, ran, rates, costs in found:
        assert_close(trained, weights(expected), 1e-5)
        assert rates[4] is None
        assert rates == found[0][2], "ranks have agreed"
        assert 0.0035 <= rates[-1]["EF", None].of(1.0) < 0.02
        assert all(ran[:4]), "planned by a worker"
        assert ran[-1], "the worker has heard of the rates"
        assert costs.EF > 1.5 * costs.F, "the guess was that both take equally long"
        assert costs.EB < costs.EF, "without a second forward"
    page = data_of(tmp_path / "timeline.html")
    assert page["shared"], "the plan is in seconds, as what was executed"
    planned, executed = ({text: end - start for text, start, end in track["ranks"][0]} for track in page["tracks"])
    encoded = [action for action in planned if action.startswith("EF")]
    assert 0.1 < sum(executed[action] for action in encoded) / sum(planned[action] for action in encoded) < 10


def _with_costs(rank: int) -> Any:
    return _fit(rank, {"costs": COSTS})[2]


def test_given_costs_are_not_measured() -> None:
    assert on_ranks(2, _with_costs) == [[None] * 16] * 2


def _fit_pair(rank: int, world: int, strategy: dict[str, Any], module: dict[str, Any], data: dict[str, Any]) -> Any:
    trained, watch = ToyModule(**module), _Watch()
    trainer = pipeline_trainer(world, strategy, max_epochs=1, limit_val_batches=0, callbacks=[watch])
    trainer.fit(trained, ToyData(steps=9, **data))
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    return weights(trained), watch.rates[-1]


@pytest.mark.parametrize(
    ("world", "strategy", "module", "data"),
    [
        (2, {"backbone": "zb1p"}, {"freeze": ["encoders", "llm.layers.0"]}, {"text_only": (0, 7)}),
        (2, {"policy": "filled", "backbone": "zbv"}, {"tied": True}, {"text_only": range(9)}),
        (3, {"policy": "disaggregated"}, {"freeze": ["generators"]}, {"microbatches": 5}),
        (
            4,
            {
                "data_parallel_size": 2,
                "microbatches": 3,
                "sharding": ShardingOptions("fsdp", "zero1", "fsdp"),
                "group_size": 2,
            },
            {"tied": True},
            {"text_only": (7,)},
        ),
    ],
)
def test_measured_times_with_other_options(
    world: int, strategy: dict[str, Any], module: dict[str, Any], data: dict[str, Any]
) -> None:
    module, replicas = {"optimizer": "sgd", **module}, strategy.get("data_parallel_size", 1)
    expected = ToyModule(**module)
    plain_trainer(max_epochs=1, limit_val_batches=0).fit(expected, ToyData(steps=9, replicas=replicas, **data))
    for trained, rates in on_ranks(world, _fit_pair, world, strategy, module, data):
        assert rates, "nothing was measured"
        assert_close(trained, weights(expected), 1e-5)
