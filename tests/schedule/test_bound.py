"""The lower bound: never above a plan, as good as the closed form of 1F1B, and near the optima that are known."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmac_lightning.schedule.bound import lower_bound
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.verify import verify
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

from .plans import plan_arguments
from .test_filling import OPTIMA


def closed_form(size: int, microbatches: int, group_size: int, costs: Costs, max_encoder_units: float) -> float:
    """For 1F1B, M >= P, groups that divide M, the same costs for all microbatches, even shares, and no generator: each
    rank has idle time before its first backward and after its last forward; encoder work that fits into it, and into
    memory, is free, and all other work is not."""
    work = microbatches / size
    early = max(0.0, min(max_encoder_units, work) - group_size / size)
    saved = min(
        min(early * costs.EF, rank * costs.F + (size - 1 - rank) * costs.B)
        + min(early * costs.EB, (size - 1 - rank) * costs.F + rank * costs.B)
        for rank in range(size)
    )
    return (microbatches + size - 1) * (costs.F + costs.B) + work * (costs.EF + costs.EB) - saved


@given(
    size=st.integers(1, 6),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 6),
    forward=st.sampled_from([0.3, 1.0, 4.0]),
    backward=st.sampled_from([0.6, 2.0, 8.0]),
    limit=st.sampled_from([2.0, 3.0, 1.5]),
)
@settings(max_examples=40, deadline=None)
def test_is_the_closed_form_on_1f1b(size, groups, group_size, forward, backward, limit):
    costs, microbatches = Costs(EF=forward, EB=backward), groups * group_size
    plan = make_plan(
        PlanRequest(pipeline_parallel_size=size, microbatches=microbatches, group_size=group_size, costs=costs)
    )
    limit = max(limit, *plan.peak["encoder_units"])
    bound = lower_bound(plan, limit)
    assert bound >= closed_form(size, microbatches, group_size, costs, limit) - 1e-9 or microbatches < size
    if microbatches >= 2 * size:
        assert bound == pytest.approx(closed_form(size, microbatches, group_size, costs, limit))
    filled = make_plan(
        PlanRequest(
            policy="filled",
            pipeline_parallel_size=size,
            microbatches=microbatches,
            group_size=group_size,
            costs=costs,
            max_encoder_units=limit,
        )
    )
    assert filled.makespan >= bound - 1e-9


@given(plan_arguments(latency=True), st.booleans())
@settings(max_examples=80, deadline=None)
def test_no_plan_is_below_it(arguments, filled):
    if filled and arguments["policy"] in ("nested", "upfront"):
        arguments |= {"policy": "filled"}
    plan = make_plan(PlanRequest(**arguments))
    assert lower_bound(plan) <= plan.makespan + 1e-9


@given(plan_arguments(policies=("nested",)))
@settings(max_examples=40, deadline=None)
def test_a_plan_found_from_another_is_not_below_its_bound(arguments):
    """The bound of the cut, with the memory that `filled` takes, holds for the filled plan, and the other way round."""
    cut, filled = make_plan(PlanRequest(**arguments)), make_plan(PlanRequest(**arguments | {"policy": "filled"}))
    most = max(cut.peak["encoder_units"] + filled.peak["encoder_units"])
    assert lower_bound(cut, most) <= filled.makespan + 1e-9
    assert lower_bound(filled, most) == pytest.approx(lower_bound(cut, most))


@pytest.mark.parametrize(("size", "microbatches", "group_size", "forward", "backward", "one", "zero"), OPTIMA)
def test_near_the_known_optima(size, microbatches, group_size, forward, backward, one, zero):
    costs = Costs(EF=forward, EB=backward)
    ideal = 3 * (microbatches + size - 1) + microbatches / size * (forward + backward)
    for backbone, optimum, least in (("1f1b", one, 0.95), ("zb1p", zero, 0.9)):
        plan = make_plan(
            PlanRequest(
                backbone=backbone,
                pipeline_parallel_size=size,
                microbatches=microbatches,
                group_size=group_size,
                costs=costs,
            )
        )
        assert least * optimum - 0.001 <= lower_bound(plan, 2) / ideal <= optimum + 0.001


def test_counts_a_generator_and_a_workload():
    plan = make_plan(PlanRequest(policy="filled", pipeline_parallel_size=8, microbatches=16, costs=Costs(G=9)))
    assert 0.9 * plan.makespan <= lower_bound(plan) <= plan.makespan
    work = Workload(tuple(MicrobatchWork(0.5 + m % 3, (1.0,) * (m % 4), (0.5,) * (m % 2)) for m in range(24)))
    plan = make_plan(PlanRequest(pipeline_parallel_size=4, microbatches=24, costs=Costs(G=1), workload=work))
    assert 0.8 * plan.makespan <= lower_bound(plan, workload=work) <= plan.makespan + 1e-9


def test_more_memory_lowers_it():
    plan = make_plan(PlanRequest(pipeline_parallel_size=4, microbatches=16, costs=Costs(EF=4, EB=8)))
    bounds = [lower_bound(plan, units) for units in (2, 2.5, 3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]
    assert lower_bound(replace(plan, policy="by hand")) == bounds[0]
    assert verify(plan).makespan >= bounds[0]
