"""Filled plans: never longer than the cut, within their limits, near the known optima."""

import time
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings

from bigmac_lightning.schedule.plan import Costs, PlanError
from bigmac_lightning.schedule.policies import make_plan
from bigmac_lightning.schedule.verify import verify
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

from .plans import plan_arguments, rendezvous_completes

OPTIMA = [  # P, M, group size, EF, EB, optimum / ideal on 1F1B and on ZB1P with two encoder units
    (4, 8, 4, 1, 2, 0.923, 0.821),
    (4, 8, 2, 4, 8, 0.877, 0.842),
    (4, 16, 4, 4, 8, 0.962, 0.924),
    (8, 16, 8, 1, 2, 0.960, 0.800),
    (8, 16, 8, 4, 8, 0.903, 0.806),
    (8, 16, 4, 4, 8, 0.860, 0.785),
]


@pytest.mark.parametrize(("size", "microbatches", "group_size", "forward", "backward", "one", "zero"), OPTIMA)
def test_near_the_optimum(size, microbatches, group_size, forward, backward, one, zero):
    costs = Costs(EF=forward, EB=backward)
    ideal = 3 * (microbatches + size - 1) + microbatches / size * (forward + backward)
    for backbone, optimum in (("1f1b", one), ("zb1p", zero)):
        plan = make_plan(
            policy="filled",
            backbone=backbone,
            pipeline_parallel_size=size,
            microbatches=microbatches,
            group_size=group_size,
            costs=costs,
            max_encoder_units=2,
        )
        assert plan.makespan / ideal <= optimum * (1.021 if microbatches == 8 else 1.015)
        assert plan.makespan / ideal >= optimum - 0.001


@given(plan_arguments(latency=True))
@settings(max_examples=60, deadline=None)
def test_never_longer_than_the_cut_and_within_its_limits(arguments):
    assume(arguments["policy"] == "nested")
    cut = make_plan(**arguments)
    filled = make_plan(**(arguments | {"policy": "filled"}))
    assert filled.makespan <= cut.makespan + 1e-9
    assert filled.ideal == pytest.approx(cut.ideal)
    limit = max(3 if "G" in filled.costs.kinds else 2, *cut.peak["encoder_units"])
    timeline = verify(filled, max_encoder_units=limit)
    assert rendezvous_completes(filled, timeline)
    for ours, theirs in zip(filled.peak["llm_microbatches"], cut.peak["llm_microbatches"], strict=True):
        assert ours <= theirs + 1e-9
    for ours, theirs in zip(filled.ranks, cut.ranks, strict=True):
        assert sorted(map(str, ours)) == sorted(map(str, theirs))
        assert [a for a in ours if not a.nested and a.kind != "W"] == [
            a for a in theirs if not a.nested and a.kind != "W"
        ]


def test_uses_the_encoder_units_that_it_may():
    costs, makespans = Costs(EF=4, EB=8), []
    for limit in (2, 3, 4):
        plan = make_plan(
            policy="filled", pipeline_parallel_size=4, microbatches=16, costs=costs, max_encoder_units=limit
        )
        assert max(plan.peak["encoder_units"]) <= limit
        makespans.append(plan.makespan)
    assert makespans[0] > makespans[-1]


def test_a_limit_that_cannot_be_kept_is_refused():
    with pytest.raises(PlanError, match=r"brings the live encoder units to .*; the limit is 0\.5"):
        make_plan(policy="filled", pipeline_parallel_size=4, microbatches=8, max_encoder_units=0.5)


def test_takes_a_workload():
    work = Workload(tuple(MicrobatchWork(0.5 + m % 3, (1.0,) * (m % 4), (0.5,) * (m % 2)) for m in range(24)))
    arguments = {"pipeline_parallel_size": 4, "microbatches": 24, "costs": Costs(G=1), "workload": work}
    cut, filled = make_plan(**arguments), make_plan(policy="filled", **arguments)
    assert filled.makespan < cut.makespan
    assert verify(filled, workload=work).makespan == filled.makespan


@pytest.mark.parametrize("backbone", ["1f1b", "zb1p"])
def test_is_the_same_every_time_and_quick(backbone):
    arguments = {
        "policy": "filled",
        "backbone": backbone,
        "pipeline_parallel_size": 8,
        "microbatches": 64,
        "costs": Costs(EF=4, EB=8),
    }
    start = time.process_time()
    plan = make_plan(**arguments)
    assert time.process_time() - start < 3  # 0.2 s on a machine that is not busy
    assert make_plan(**arguments) == plan
    assert plan.makespan < 0.99 * make_plan(**(arguments | {"policy": "nested"})).makespan
    assert verify(replace(plan, policy="by hand"), max_encoder_units=2).makespan == plan.makespan
