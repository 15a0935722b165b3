"""Lines through measured times."""

from random import Random

import pytest

from bigmac_lightning.schedule.rates import Rate, Sample


def _samples(each: float, per_cost: float, noise: float = 0.0, numbers: int = 40) -> list[Sample]:
    random = Random(f"{each} {per_cost}")
    works = [(items := random.randint(1, 4), sum(random.uniform(1, 9) for _ in range(items))) for _ in range(numbers)]
    return [Sample(n, c, (each * n + per_cost * c) * (1 + noise * random.random())) for n, c in works]


@pytest.mark.parametrize(("each", "per_cost"), [(0.3, 0.02), (0.0, 0.5), (2.0, 0.0)])
def test_a_line_is_found(each: float, per_cost: float) -> None:
    samples = _samples(each, per_cost)
    found = Rate.fit(samples)
    assert found is not None
    assert (found.each, found.per_cost) == pytest.approx((each, per_cost), abs=1e-9)
    assert found.mean == pytest.approx(sum(s.seconds for s in samples) / len(samples))
    assert found.of(3) == pytest.approx(each + 3 * per_cost)


def test_disturbed_actions_do_not_count() -> None:
    samples = _samples(0.3, 0.1, noise=0.05)
    disturbed = [s._replace(seconds=50 * s.seconds) if i % 10 == 0 else s for i, s in enumerate(samples)]
    found, without = Rate.fit(disturbed), Rate.fit([s for i, s in enumerate(samples) if i % 10])
    assert found == without


def test_equal_work_gives_no_more_than_a_mean() -> None:
    found = Rate.fit([Sample(1, 4.0, seconds) for seconds in (1.0, 1.1, 0.9)])
    assert found is not None
    assert found.of(4.0) == pytest.approx(1.0)
    free = Rate.fit([Sample(2, 0.0, seconds) for seconds in (1.0, 3.0)])
    assert free is not None
    assert free.of(0.0) == pytest.approx(1.0)


def test_no_part_of_a_time_is_negative() -> None:
    """Larger items that took less time."""
    found = Rate.fit([Sample(1, cost, 2.0 - 0.1 * cost) for cost in (1.0, 2.0, 3.0)])
    assert found is not None
    assert found.each > 0
    assert found.per_cost >= 0


def test_nothing_was_done() -> None:
    assert Rate.fit([]) is None
    assert Rate.fit([Sample(0, 0.0, 0.1)]) is None
