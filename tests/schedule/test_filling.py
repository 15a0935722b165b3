"""Filled plans: never longer than the cut, within their limits, near the known optima."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.groups import ramp_groups
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.placing.swaps import swap
from bigmac_lightning.schedule.placing.tasks import Tasks
from bigmac_lightning.schedule.placing.uneven_shares import balanced_shares
from bigmac_lightning.schedule.plan import Costs, PlanError
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import durations, simulate
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


def ratio(backbone: str, size: int, microbatches: int, group_size: int, costs: Costs, **more) -> float:
    """Makespan of a filled plan with at most two encoder units, over the ideal on 1F1B."""
    plan = make_plan(
        PlanRequest(
            policy="filled",
            backbone=backbone,
            pipeline_parallel_size=size,
            microbatches=microbatches,
            group_size=group_size,
            costs=costs,
            max_encoder_units=2,
            **more,
        )
    )
    return plan.makespan / (3 * (microbatches + size - 1) + microbatches / size * (costs.EF + costs.EB))


def test_near_the_optimum():
    """Of the fixed LLM order, as a constraint solver proved it."""
    gaps = []
    for size, microbatches, group_size, forward, backward, one, zero in OPTIMA:
        costs = Costs(EF=forward, EB=backward)
        for backbone, optimum in (("1f1b", one), ("zb1p", zero)):
            gaps.append(ratio(backbone, size, microbatches, group_size, costs) / optimum - 1)
    assert max(gaps) <= 0.015
    assert sum(gaps) / len(gaps) <= 0.005
    assert min(gaps) >= -0.001


def test_below_the_optimum_of_whole_shares_with_pieces_and_ramp_groups():
    better = 0
    for size, microbatches, group_size, forward, backward, one, zero in OPTIMA:
        costs, ramp = Costs(EF=forward, EB=backward), ramp_groups(microbatches, group_size)
        for backbone, optimum in (("1f1b", one), ("zb1p", zero)):
            found = ratio(backbone, size, microbatches, group_size, costs, pieces=8, groups=ramp)
            assert found <= optimum + 0.001
            better += found < optimum - 0.001
    assert better >= 11


def test_pieces_are_equal_parts_and_the_same_forwards_and_backwards():
    costs = Costs(EF=4, EB=8)
    plan = make_plan(
        PlanRequest(policy="filled", pipeline_parallel_size=4, microbatches=8, group_size=2, costs=costs, pieces=3)
    )
    texts = [str(action) for action in plan.ranks[1]]
    assert [text for text in texts if text.startswith(("EF1", "EB1"))] == [
        f"{kind}1.{piece}/3" for kind in ("EF", "EB") for piece in range(3)
    ]
    verify(plan, max_encoder_units=2)
    whole = make_plan(PlanRequest(policy="filled", pipeline_parallel_size=4, microbatches=8, group_size=2, costs=costs))
    assert plan.makespan < whole.makespan


@given(st.integers(1, 70), st.integers(1, 9))
def test_ramp_groups(microbatches, group_size):
    groups = ramp_groups(microbatches, group_size)
    sizes = [len(group) for group in groups]
    assert [m for group in groups for m in group] == list(range(microbatches))
    assert sizes[0] == sizes[-1] == 1
    assert max(sizes) <= group_size


@pytest.mark.parametrize(
    ("microbatches", "group_size", "sizes"),
    [
        (64, 8, [1, 1, 2, 4, 8, 8, 8, 8, 8, 8, 4, 2, 1, 1]),
        (20, 9, [1, 1, 2, 4, 4, 4, 2, 1, 1]),
        (8, 4, [1, 1, 2, 2, 1, 1]),
        (3, 4, [1, 1, 1]),
        (1, 1, [1]),
    ],
)
def test_ramp_groups_grow_and_shrink(microbatches, group_size, sizes):
    assert [len(group) for group in ramp_groups(microbatches, group_size)] == sizes


@pytest.mark.parametrize("backbone", ["1f1b", "zb1p"])
@pytest.mark.parametrize("generator", [0, 3])
def test_idle_ranks_get_larger_shares(backbone, generator):
    """The last stage is slower than the others, as it has the head."""
    costs = Costs(EF=1, EB=2, G=generator)
    slow = [[1, 2, 1, 1]] * 3 + [[1.4, 2.8, 1.4, 1.4]]
    arguments = {"pipeline_parallel_size": 4, "microbatches": 16, "costs": costs, "stage_costs": slow}
    arguments |= {"policy": "filled", "backbone": backbone, "max_encoder_units": 3}
    even = [[0.25] * 4] * 4
    evenly = make_plan(PlanRequest(encoder_shares=even, generator_shares=even if generator else None, **arguments))
    uneven = make_plan(PlanRequest(**arguments))
    assert uneven.makespan < 0.99 * evenly.makespan
    assert max(uneven.peak["encoder_units"]) <= 3
    rows = uneven.generator_shares if generator else uneven.encoder_shares
    assert rows[1][3] < 0.25 < rows[1][0]


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=1, max_size=6), st.sampled_from([0.5, 3.0, 40.0]))
def test_balanced_shares_end_together(busy, work):
    shares = balanced_shares(busy, work)
    assert sum(shares) == pytest.approx(1)
    ends = [time + share * work for time, share in zip(busy, shares, strict=True)]
    level = max(end for end, share in zip(ends, shares, strict=True) if share)
    for before, end, share in zip(busy, ends, shares, strict=True):
        assert end == pytest.approx(level) if share > 0 else before >= level - 1e-9


@given(plan_arguments(policies=("nested",)), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_swaps_keep_needs_and_never_lengthen(arguments, passes):
    cut = make_plan(PlanRequest(**arguments))
    flow, lengths = Dataflow(cut), [time for row in durations(cut) for time in row]
    chains = []
    for rank, actions in enumerate(cut.ranks):
        numbers = range(flow.first[rank], flow.first[rank] + len(actions))
        chains.append([[n for n in numbers if flow.actions[n].nested is nested] for nested in (False, True)])
    arcs = [(need, number) for number, needs in enumerate(flow.needs) for need in needs]
    tasks = Tasks(lengths, flow.ranks, chains, arcs, 0.0)
    starts = [start for row in simulate(cut).starts for start in row]
    found = swap(tasks, starts, passes)
    assert tasks.makespan(found) <= cut.makespan + 1e-9
    assert tasks.makespan(found) >= tasks.lower_bound() - 1e-9
    for number, needs in enumerate(tasks.needs):
        assert all(found[number] >= found[need] + lengths[need] - 1e-9 for need, _ in needs)
    for rank in range(len(cut.ranks)):
        own = sorted(range(flow.first[rank], flow.first[rank + 1]), key=lambda n: (found[n], found[n] + lengths[n]))
        assert all(found[one] + lengths[one] <= found[other] + 1e-9 for one, other in pairwise(own))


@given(plan_arguments(latency=True, policies=("nested",)), st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_never_longer_than_the_cut_and_within_its_limits(arguments, pieces):
    cut = make_plan(PlanRequest(**arguments))
    filled = make_plan(PlanRequest(**arguments | {"policy": "filled"}, pieces=pieces))
    assert filled.makespan <= cut.makespan + 1e-9
    assert filled.ideal == pytest.approx(cut.ideal)
    limit = max(3 if "G" in filled.costs.kinds else 2, *cut.peak["encoder_units"])
    timeline = verify(filled, max_encoder_units=limit)
    assert rendezvous_completes(filled, timeline)
    for ours, theirs in zip(filled.peak["llm_microbatches"], cut.peak["llm_microbatches"], strict=True):
        assert ours <= theirs + 1e-9
    for ours, theirs in zip(filled.ranks, cut.ranks, strict=True):
        assert {str(replace(a, piece=0, pieces=1)) for a in ours} == {str(a) for a in theirs}
        assert [a for a in ours if not a.nested and a.kind != "W"] == [
            a for a in theirs if not a.nested and a.kind != "W"
        ]


def test_uses_the_encoder_units_that_it_may():
    costs, makespans = Costs(EF=4, EB=8), []
    for limit in (2, 3, 4):
        plan = make_plan(
            PlanRequest(
                policy="filled", pipeline_parallel_size=4, microbatches=16, costs=costs, max_encoder_units=limit
            )
        )
        assert max(plan.peak["encoder_units"]) <= limit
        makespans.append(plan.makespan)
    assert makespans[0] > makespans[-1]


def test_a_limit_that_cannot_be_kept_is_refused():
    with pytest.raises(PlanError, match=r"brings the live encoder units to .*; the limit is 0\.5"):
        make_plan(PlanRequest(policy="filled", pipeline_parallel_size=4, microbatches=8, max_encoder_units=0.5))


def test_takes_a_workload():
    work = Workload(tuple(MicrobatchWork(0.5 + m % 3, (1.0,) * (m % 4), (0.5,) * (m % 2)) for m in range(24)))
    arguments = {"pipeline_parallel_size": 4, "microbatches": 24, "costs": Costs(G=1), "workload": work}
    cut, filled = make_plan(PlanRequest(**arguments)), make_plan(PlanRequest(policy="filled", **arguments))
    assert filled.makespan < cut.makespan
    assert verify(filled, workload=work).makespan == filled.makespan


@pytest.mark.parametrize("backbone", ["1f1b", "zb1p"])
def test_is_the_same_every_time(backbone):
    arguments = {
        "policy": "filled",
        "backbone": backbone,
        "pipeline_parallel_size": 8,
        "microbatches": 64,
        "costs": Costs(EF=4, EB=8),
    }
    plan = make_plan(PlanRequest(**arguments))
    assert make_plan(PlanRequest(**arguments)) == plan
    assert plan.makespan < 0.99 * make_plan(PlanRequest(**(arguments | {"policy": "nested"}))).makespan
    assert verify(replace(plan, policy="by hand"), max_encoder_units=2).makespan == plan.makespan


@pytest.mark.parametrize(
    ("backbone", "stages"),
    [("interleaved_1f1b", 2), ("interleaved_1f1b", 3), ("zbv", 2), ("dualpipev", 2), ("zb1p", 1)],
)
def test_any_backbone_takes_no_more_than_itself_and_the_nested_work(backbone, stages):
    """With at most three encoder units; with whole shares, and filled."""
    for size, microbatches in ((4, 8), (4, 16), (8, 16), (4, 10), (8, 32)):
        for forward in (1, 4):
            costs = Costs(EF=forward, EB=2 * forward)
            for policy in ("nested", "filled"):
                plan = make_plan(
                    PlanRequest(
                        policy=policy,
                        backbone=backbone,
                        virtual_stages=stages,
                        pipeline_parallel_size=size,
                        microbatches=microbatches,
                        costs=costs,
                        max_encoder_units=3,
                    )
                )
                assert plan.makespan <= plan.ideal * (1 + 1e-9)
