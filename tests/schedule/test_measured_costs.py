"""Costs that were measured: their file, other stages, and the plans that `bigmac plan` makes from them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.commands import compare, plan
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.measured_costs import MeanWork, MeasuredCosts
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.rates import Rate
from bigmac_lightning.schedule.request import ScheduleOptions

RATES: dict[Any, Rate] = {
    ("F", 0): Rate(0.1, 0.01, 0.5),
    ("F", 1): Rate(0.2, 0.02, 1.0),
    ("B", 0): Rate(0.0, 0.02, 0.8),
    ("B", 1): Rate(0.5, 0.04, 2.1),
    ("EF", None): Rate(0.05, 0.5, 0.7),
    ("EB", None): Rate(0.1, 1.0, 1.4),
}
KNOWN = MeasuredCosts(
    rates=RATES,
    work=MeanWork(tokens=40, llm=40, items=2, rows=32, media=1.5),
    layers=(3, 2),
    pipeline_parallel_size=2,
    device="cpu: x86_64",
    precision="32-true",
    model="0",
    trained=("llm", "encoders.image"),
    versions={"torch": "2"},
    message=0.01,
    encoder_unit=1000,
    llm_microbatch=3000,
    left_out=("peak: only on CUDA",),
)
PARTS = dict.fromkeys("FBIW", (0.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    KNOWN.save(tmp_path / "costs.json")
    assert MeasuredCosts.load(tmp_path / "costs.json") == KNOWN
    assert "peak" not in json.loads((tmp_path / "costs.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "bigmac-costs/2"}, 'x.json: format: expected "bigmac-costs/1", found "bigmac-costs/2"'),
        ({"colour": 1}, "x.json: colour: no such key"),
        ({"layers": [3, 0]}, r"x.json: layers\[1\]: expected a list with the number of layers"),
        ({"layers": [3]}, "stage: expected a number below 1, as layers has 1 stages, found 1"),
        ({"layers": [3, 1, 1]}, "rates: expected a time above 0 for F of stage 2"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size: expected an integer of at least 1, found 0"),
        ({"message": -1}, "message: expected a number of at least 0, found -1"),
        ({"versions": {"torch": 2}}, "versions: expected an object of texts"),
        ({"trained": "llm"}, "trained: expected a list of texts"),
        ({"work": {"tokens": 4}}, "x.json: work: llm is missing"),
        ({"work": asdict(KNOWN.work) | {"tokens": 0}}, "x.json: work: tokens: expected a number above 0"),
        ({"rates": [{"kind": "X"}]}, r"rates\[0\]: kind: expected one of F, B, I, W, EF, EB, G"),
        (
            {"rates": [{"kind": "G", "stage": 0, "each": 1, "per_cost": 0, "mean": 1}]},
            r"rates\[0\]: stage: expected no such key, as G belongs to no stage, found 0",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_its_key(change: dict[str, Any], message: str) -> None:
    text = json.dumps(json.loads(KNOWN.to_json()) | change)
    with pytest.raises(ValueError, match=message):
        MeasuredCosts.from_json(text, "x.json")


def test_costs_of_the_mean_microbatch() -> None:
    costs = KNOWN.costs(2)
    assert pytest.approx((0.1 + 0.4 + 0.2 + 0.8) / 2) == costs.F
    assert pytest.approx((0.8 + 0.5 + 1.6) / 2) == costs.B
    assert pytest.approx(costs.B / 2) == costs.I == costs.W
    assert pytest.approx(2 * 0.05 + 1.5 * 0.5) == costs.EF
    assert (costs.G, costs.latency) == (0, 0.01)
    assert pytest.approx(costs.F / 2) == KNOWN.costs(4).F
    assert pytest.approx(costs.EF / 2) == replace(KNOWN, tensor_parallel_size=2).costs(2).EF
    halves: dict[Any, Rate] = {("I", 0): Rate(0.7, 0, 1), ("W", 0): Rate(0.4, 0, 1)}
    assert replace(KNOWN, rates=RATES | halves).stage_rows[0] == pytest.approx([0.5, 1.1, 0.7, 0.4])


def test_costs_grow_with_the_amounts_of_a_microbatch() -> None:
    more = replace(KNOWN, work=KNOWN.work.with_amounts(80, 16, 0)).costs(2)
    assert pytest.approx((0.1 + 0.8 + 0.2 + 1.6) / 2) == more.F
    assert pytest.approx(KNOWN.costs(2).EF / 2) == more.EF


def test_times_are_spread_over_other_stages() -> None:
    assert KNOWN.at((3, 2), PARTS) is KNOWN.rates
    one = KNOWN.at((5,), PARTS)
    assert one["F", 0].of(40) == pytest.approx(1.5)
    assert one["EF", None] == RATES["EF", None]
    many = KNOWN.at((1, 1, 1, 1, 1), PARTS, factor=0.5)
    assert [many["F", s].of(40) for s in range(5)] == pytest.approx([0.0625, 0.0625, 0.125, 0.125, 0.375])
    assert sum(many["B", s].of(40) for s in range(5)) == pytest.approx(0.5 * (0.8 + 2.1))
    frozen = {key: rate for key, rate in RATES.items() if key != ("B", 0)}
    assert ("B", 0) not in replace(KNOWN, rates=frozen).at((2, 3), PARTS)
    assert replace(KNOWN, rates=frozen).at((2, 3), PARTS)["B", 1].of(40) == pytest.approx(2.1)


def test_equal_microbatches_take_the_mean_time() -> None:
    rates = KNOWN.of_equal_work(3, 0)
    assert 3 * rates["EF", None].of(1.0) == pytest.approx(KNOWN.costs(2).EF)
    assert rates["F", 1].of(12345.0) == pytest.approx(1.0)


def test_memory_that_is_not_given_is_the_measured_one() -> None:
    assert KNOWN.memory(MemoryBudget("1MiB"), 4) == MemoryBudget("1MiB", 1000, 1500)
    assert KNOWN.memory(MemoryBudget(llm_microbatch="7KiB"), 2).llm_microbatch == "7KiB"


def test_plans_are_made_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "costs.json", tmp_path / "plan.json"
    KNOWN.save(file)
    arguments = ["--pipeline_parallel_size", "2", "--microbatches", "6", "--costs", str(file)]
    assert plan.main([*arguments, "--output", str(output)]) == 0
    options = ScheduleOptions(costs=KNOWN.costs(2))
    expected = make_plan(options.request(2, 6, stage_costs=KNOWN.stage_rows))
    assert Plan.load(output).makespan == pytest.approx(expected.makespan)
    assert expected.makespan != pytest.approx(make_plan(options.request(2, 6)).makespan), "stages differ"
    other = ["--pipeline_parallel_size", "4", "--microbatches", "6", "--costs", str(file)]
    assert plan.main([*other, "--output", str(output)]) == 0
    assert pytest.approx(KNOWN.costs(4).F) == Plan.load(output).costs.F
    assert compare.main([*arguments, "--backbones", "1f1b,zb1p", "--memory.budget", "100MiB"]) == 0
    assert plan.main([*arguments, "--policy", "disaggregated"]) == 0
    assert plan.main([*arguments, "--backbone", "auto", "--memory.budget", "4KiB"]) == 2
    assert "no plan that is possible" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.json", "nowhere.json: cannot be read: No such file"),
        ("costs.yaml", "costs is 'costs.yaml'; expected times of the actions, a .json file, or \"auto\""),
    ],
)
def test_a_file_that_is_not_there(value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--pipeline_parallel_size", "2", "--microbatches", "6", "--costs", value]) == 2
    assert message in capsys.readouterr().err


def test_a_request_has_times_and_no_file() -> None:
    with pytest.raises(ValueError, match=r"costs is 'costs.json'; expected times"):
        ScheduleOptions(costs="costs.json").request(2, 4)
    assert ScheduleOptions(costs="auto").given_costs is None
    assert ScheduleOptions(costs=Costs()).costs_file is None
