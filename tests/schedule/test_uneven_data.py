"""Uneven batches, simulated with true item times: what balance, filling and wrong costs make of them."""

from statistics import mean

import pytest

from benchmarks.uneven_data import CASES, Result, draw, measure

SEEDS = range(3)


def _mean(name: str, forward: float) -> Result:
    results = [measure(CASES[name], seed, forward) for seed in SEEDS]
    return Result(mean(r.ratio for r in results), mean(r.units for r in results), mean(r.seconds for r in results))


def test_batches_are_as_uneven_as_said():
    rows = draw(0, 4.0)
    assert mean(sum(row) for row in rows) == pytest.approx(4)
    assert {len(row) for row in rows} <= set(range(1, 17))
    assert max(map(max, rows)) > 4


@pytest.mark.parametrize("forward", [1.0, 4.0])
def test_balance_beats_whole_microbatches_with_less_memory_than_upfront(forward):
    first, upfront, whole, balanced = (
        _mean(name, forward)
        for name in ("first_stage", "upfront", "nested, whole microbatches", "nested, carried over")
    )
    assert upfront.ratio == pytest.approx(1, abs=0.002)
    assert balanced.ratio < 1.04 < 1.07 < whole.ratio < first.ratio
    assert balanced.units < whole.units < upfront.units


def test_plans_made_with_somewhat_wrong_costs_still_serve():
    right = _mean("filled, carried over, 4 units", 1.0)
    assert _mean("  item times wrong by 20%", 1.0).ratio < right.ratio + 0.03
    assert _mean("  item times wrong by 40%", 1.0).ratio < 1.03


@pytest.mark.parametrize("forward", [1.0, 4.0])
def test_filled_meets_its_goals(forward):
    three, four = (_mean(f"filled, carried over, {units} units", forward) for units in (3, 4))
    assert three.ratio <= 0.985
    assert four.ratio <= 0.97
    assert three.ratio <= _mean("filled, group by group, 3 units", forward).ratio
    largest = mean(max(map(max, draw(seed, forward))) / forward for seed in SEEDS)
    assert three.units <= 3 + largest + 1e-9
    assert four.units <= 4 + largest + 1e-9
