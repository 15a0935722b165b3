"""Plans whose ranks wait for each other inside nested actions, as the weights lie in shards on all of them."""

import random
from collections import defaultdict
from typing import Any

import pytest

from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.collective_order import collective_order
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Plan, PlanError
from bigmac_lightning.schedule.request import PlanRequest, ScheduleOptions
from bigmac_lightning.schedule.simulate import durations, simulate

ALL: tuple[Kind, ...] = ("EF", "EB", "G")
ENCODERS_ALONE, WITH_GENERATOR = {"EF": 0.3, "EB": 0.6, "G": 0.0}, {"EF": 1.0, "EB": 2.0, "G": 3.0}


def _request(size: int, microbatches: int, costs: dict[str, float], meeting: Any = (), **options: Any) -> PlanRequest:
    made = ScheduleOptions(costs=Costs(F=1, B=2, I=1, W=1, **costs), **options)
    return made.request(size, microbatches, meeting=meeting)


@pytest.mark.parametrize("costs", [ENCODERS_ALONE, WITH_GENERATOR])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_waiting_takes_little_with_groups_of_twice_as_many_microbatches(size: int, costs: dict[str, float]) -> None:
    options: Any = {"group_size": 2 * size}
    alone = make_plan(_request(size, 8 * size, costs, **options))
    met = make_plan(_request(size, 8 * size, costs, ALL, **options))
    assert alone.makespan <= met.makespan < 1.03 * alone.makespan
    assert max(met.peak["encoder_units"]) <= max(alone.peak["encoder_units"])
    assert met.peak["llm_microbatches"] == alone.peak["llm_microbatches"]


def test_two_ranks_with_an_encoder_meet_when_neither_is_busy() -> None:
    alone, met = (make_plan(_request(2, 16, ENCODERS_ALONE, meeting)) for meeting in ((), ALL))
    assert met.makespan == pytest.approx(alone.makespan)


def _drawn(seed: int) -> tuple[PlanRequest, PlanRequest]:
    """A request without meetings, and the same one with."""
    draw = random.Random(seed)
    trained = draw.random() < 0.8
    costs = Costs(
        F=1,
        B=2 * trained,
        I=1 * trained,
        W=1 * trained,
        EF=draw.choice([0.1, 1, 3]),
        EB=draw.choice([0, 2]) * trained,
        G=draw.choice([0, 3]),
        latency=draw.choice([0, 0.1, 0.7]),
    )
    size = draw.choice([2, 3, 4, 6])
    backbones = ["gpipe", "1f1b", "interleaved_1f1b", *(["zb1p", "zbv"] if trained else [])]
    options = ScheduleOptions(
        policy=draw.choice(["nested", "filled", "upfront", "recompute"]),
        backbone=draw.choice(backbones),
        group_size=draw.choice([1, 2, size, 2 * size]),
        pieces=1,
        costs=costs,
    )
    microbatches, meeting = draw.choice([1, 2, 5, 8, 13]), draw.choice([ALL, ("EF", "EB"), ("G",)])
    return options.request(size, microbatches), options.request(size, microbatches, meeting=meeting)


@pytest.mark.parametrize("seed", range(60))
def test_random_plans(seed: int) -> None:
    alone, met = map(make_plan, _drawn(seed))
    timeline, times = simulate(met), durations(met)
    collective_order(met, met.meeting, timeline.order)  # raises if ranks could wait for each other for ever
    assert Plan.from_json(met.to_json()) == met
    assert max(met.peak["encoder_units"]) <= max(alone.peak["encoder_units"]) + 1e-9
    together: dict[Any, list[Any]] = defaultdict(list)
    for rank, row in enumerate(met.ranks):
        for i, action in enumerate(row):
            start, end = timeline.starts[rank][i], timeline.ends[rank][i]
            before = timeline.ends[rank][i - 1] if i else 0.0
            assert before <= start + 1e-9
            if action.kind in met.meeting:
                together[action.kind, action.index].append((start, end, times[rank][i], before))
            else:
                assert end - start == pytest.approx(times[rank][i])
    for found in together.values():
        starts, ends, lengths, befores = map(list, zip(*found, strict=True))
        assert len(found) == met.pipeline_parallel_size
        assert len(set(starts)) == len(set(ends)) == 1
        assert ends[0] - starts[0] == pytest.approx(max(lengths))
        assert starts[0] >= max(befores) - 1e-9


@pytest.mark.parametrize("meeting", [ALL, ("EF", "EB"), ("G",)])
def test_filled_is_never_longer_than_nested(meeting: Any) -> None:
    for size, microbatches in ((2, 7), (4, 8), (4, 12)):
        filled, nested = (
            make_plan(_request(size, microbatches, WITH_GENERATOR, meeting, policy=policy))
            for policy in ("filled", "nested")
        )
        assert filled.makespan <= nested.makespan + 1e-9


def test_a_plan_in_which_ranks_cannot_meet_is_refused() -> None:
    plan = make_plan(_request(2, 4, ENCODERS_ALONE, ALL))
    row = plan.ranks[1]
    late = next(action for action in row if str(action) == "EF1")
    row.remove(late)
    row.append(late)  # rank 0 waits for it before the first backwards, which rank 1 waits for
    with pytest.raises(PlanError, match="the plan cannot progress"):
        simulate(plan)


def test_a_file_with_unknown_meetings_is_refused() -> None:
    text = make_plan(_request(2, 4, ENCODERS_ALONE, ALL)).to_json().replace('"meeting": ["EF"', '"meeting": ["F"')
    with pytest.raises(PlanError, match=r"meeting\[0\].*EF, EB and G"):
        Plan.from_json(text)
