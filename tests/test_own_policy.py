"""The policy of docs/design.md: its plans are right, and a training with it is that of one process."""

from collections.abc import Iterator
from typing import Any

import pytest

from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import PlanRequest
from tests.blocks import block_with
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

NAME = "forward_first"


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    exec(block_with("docs/design.md", "forward_first.py"), {})
    yield
    del POLICIES[NAME]


@pytest.mark.parametrize("backbone", ["1f1b", "zbv"])
@pytest.mark.parametrize("costs", [Costs(F=1, B=2, EF=1, EB=2, G=3), Costs(F=1, B=2, EF=1, EB=0), Costs(EF=0, EB=0)])
def test_its_plans_are_verified(backbone: str, costs: Costs) -> None:
    """... and no longer than the ideal, as everything is spread."""
    plan = make_plan(
        PlanRequest(policy=NAME, backbone=backbone, pipeline_parallel_size=4, microbatches=16, costs=costs)
    )
    assert plan.makespan <= plan.ideal * 1.06
    assert max(plan.peak["encoder_units"], default=0) == (4 if costs.EB else costs.EF)
    if costs.EF:
        assert [str(action) for action in plan.ranks[2][:4]] == ["EF0", "EF1", "EF2", "EF3"]


def _trained(rank: int) -> Any:
    trainer = pipeline_trainer(2, {"policy": NAME}, max_epochs=1)
    module = ToyModule()
    trainer.fit(module, ToyData())
    return weights(module)


def test_it_trains_as_one_process() -> None:
    module = ToyModule()
    plain_trainer(max_epochs=1).fit(module, ToyData())
    for part in on_ranks(2, _trained):
        assert_close(part, weights(module), 2e-6)
