"""Backbones give the orders of the golden files, and fit any number of microbatches."""

import re
from pathlib import Path

import pytest

from bigmac_lightning.schedule.backbones import BACKBONES, get_backbone
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.policies import make_plan

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_order_is_the_golden_one(path):
    match = re.fullmatch(r"(\w+)_P(\d+)_M(\d+)(?:_extra(\d+))?", path.stem)
    assert match
    name, size, microbatches, extra = match.groups()
    orders = BACKBONES[name].build(int(size), int(microbatches), int(extra or 0))
    assert "".join(" ".join(map(str, actions)) + "\n" for actions in orders) == path.read_text()


@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize("name", BACKBONES)
def test_any_number_of_microbatches_runs(name, extra):
    for size in range(1, 7):
        for microbatches in range(1, 14):
            plan = make_plan(
                backbone=name,
                pipeline_parallel_size=size,
                microbatches=microbatches,
                costs=Costs(EF=0),
                extra_in_flight=extra,
            )
            assert plan.makespan == pytest.approx(3 * (microbatches + size - 1))
            if name == "1f1b":
                assert plan.peak["llm_microbatches"] == [min(microbatches, size - rank + extra) for rank in range(size)]
            else:
                assert plan.peak["llm_microbatches"] == [microbatches] * size


def test_against_torch_1f1b():
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    order = getattr(schedules.Schedule1F1B, "_get_pipeline_order", None)
    if order is None:
        pytest.skip("this torch does not give its 1F1B as an order")

    class Shape:
        pp_group_size, _num_stages, _n_microbatches = 4, 4, 9

    torch_order = order(Shape())
    ours = BACKBONES["1f1b"].build(4, 9)
    for rank in range(3):  # torch's text for the last rank starts with 3F1 and has no 3F0: a slip that it never runs
        theirs = [str(action) for action in torch_order[rank] if action is not None and "REDUCE" not in str(action)]
        assert theirs == [str(action) for action in ours[rank]]


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="backbone is 'zb'; expected one of gpipe, 1f1b"):
        get_backbone("zb")
