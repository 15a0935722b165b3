"""Plans as a whole: makespans, peaks, round trips, and whatever arguments are drawn."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.plan import Costs, Plan, PlanError
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import durations, simulate
from bigmac_lightning.schedule.verify import verify
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

from .plans import plan_arguments, reference_ends, rendezvous_completes


@pytest.mark.parametrize("generator", [0, 3, 9])
@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (4, 8)])
@pytest.mark.parametrize("microbatches", [8, 16, 64, 20])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_nested_takes_the_ideal_time_in_bounded_memory(size, microbatches, forward, backward, generator):
    costs = Costs(EF=forward, EB=backward, G=generator)
    plan = make_plan(PlanRequest(pipeline_parallel_size=size, microbatches=microbatches, costs=costs))
    ideal = 3 * (microbatches + size - 1) + microbatches / size * (forward + backward + generator)
    assert plan.ideal == pytest.approx(ideal, abs=1e-9)
    assert plan.makespan == pytest.approx(ideal, abs=1e-9)
    assert max(plan.peak["encoder_units"]) <= (3 if generator else 2)
    extra = size if generator else 0
    in_flight = [min(microbatches, size - rank + extra) for rank in range(size)]
    assert plan.peak["llm_microbatches"] == in_flight


@pytest.mark.parametrize(("group_size", "units"), [(8, 2), (4, 1.5), (1, 1.125)])
def test_smaller_groups_take_less_memory_and_no_more_time(group_size, units):
    plan = make_plan(PlanRequest(pipeline_parallel_size=8, microbatches=64, group_size=group_size))
    assert plan.makespan <= plan.ideal + 1e-9
    assert max(plan.peak["encoder_units"]) == units


@pytest.mark.parametrize("generator", [0, 3])
@pytest.mark.parametrize("microbatches", [8, 64])
def test_policies_compare_as_known(microbatches, generator):
    made = {
        policy: make_plan(
            PlanRequest(
                policy=policy, pipeline_parallel_size=4, microbatches=microbatches, costs=Costs(EF=4, EB=8, G=generator)
            )
        )
        for policy in POLICIES
    }
    assert len({round(plan.ideal, 6) for plan in made.values()}) == 1
    again = microbatches / 4 * 4  # every rank's forwards once more
    assert made["recompute"].makespan == pytest.approx(made["upfront"].makespan + again, abs=1e-9)
    assert made["recompute"].peak["encoder_units"] == [1] * 4
    assert made["disaggregated"].makespan > made["nested"].makespan
    assert made["filled"].makespan <= 0.995 * made["nested"].makespan
    assert made["upfront"].makespan == pytest.approx(made["nested"].makespan, abs=1e-9)
    assert made["upfront"].peak["encoder_units"] == [microbatches / 4] * 4
    assert made["first_stage"].makespan > 1.3 * made["nested"].makespan
    assert made["first_stage"].peak["encoder_units"] == [4, 0, 0, 0]


def test_first_stage_puts_the_work_around_its_microbatch():
    plan = make_plan(
        PlanRequest(policy="first_stage", pipeline_parallel_size=2, microbatches=2, costs=Costs(G=1), group_size=2)
    )
    assert [" ".join(map(str, actions)) for actions in plan.ranks] == [
        "EF0 0F0 EF1 0F1 0B0 EB0 0B1 EB1",
        "1F0 G0 1B0 1F1 G1 1B1",
    ]


def test_ranks_of_their_own_by_hand():
    plan = make_plan(
        PlanRequest(
            policy="disaggregated",
            pipeline_parallel_size=4,
            microbatches=6,
            group_size=2,
            costs=Costs(G=1),
            stage_rank=[1, 2],
        )
    )
    assert [" ".join(map(str, actions)) for actions in plan.ranks] == [
        "EF0 EF1 EF2 EB0 EB1 EB2",
        "0F0 0F1 0F2 0F3 0F4 0F5 0B0 0B1 0B2 0B3 0B4 0B5",
        "1F0 1F1 1F2 1F3 1F4 1B0 1F5 1B1 1B2 1B3 1B4 1B5",
        "G0 G1 G2",
    ]
    assert plan.stage_costs == [[2, 4, 2, 2]] * 2  # four ranks' layers on two
    assert plan.ideal == 3 * (6 + 3) + 6 / 4 * 4
    assert plan.peak["llm_microbatches"] == [0, 6, 5, 0]


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (Costs(), range(1, 8)),
        (Costs(EF=8, EB=16), range(4, 8)),
        (Costs(EF=0), range(8)),
        (Costs(EF=0, G=24), range(4)),
        (Costs(EF=4, EB=8, G=12), range(2, 6)),
    ],
)
def test_numbers_of_own_ranks_follow_the_costs(costs, expected):
    arguments = {"policy": "disaggregated", "pipeline_parallel_size": 8, "microbatches": 64, "costs": costs}
    plan = make_plan(PlanRequest(**arguments, group_size=4))
    assert plan.stage_rank == list(expected)
    for first in range(8):  # no other layout is faster
        for last in range(first, 8):
            if bool(first) == ("EF" in costs.kinds) and (last < 7) == ("G" in costs.kinds):
                other = make_plan(PlanRequest(**arguments, group_size=4, stage_rank=range(first, last + 1)))
                assert other.makespan >= plan.makespan - 1e-9


def test_encoder_ranks_run_ahead_by_a_bounded_number_of_microbatches():
    peaks = [
        make_plan(PlanRequest(policy="disaggregated", pipeline_parallel_size=4, microbatches=m, group_size=1)).peak[
            "encoder_units"
        ]
        for m in (16, 64)
    ]
    assert peaks[0] == peaks[1]
    assert max(peaks[0]) <= 6


def test_nested_order_by_hand():
    # bare starts: 0F0 0, 0F1 1, 0B0 4, 0F2 6, 0B1 7 .. 9, 0F3 9; 1F0 1, 1B0 2, 1F1 4, 1B1 5, 1F2 7, 1B2 8, 1F3 10
    # cuts: EF1 at 6 - 2 (lead), EB0 at 9
    plan = make_plan(PlanRequest(pipeline_parallel_size=2, microbatches=4, group_size=2))
    assert [" ".join(map(str, actions)) for actions in plan.ranks] == [
        "EF0 0F0 0F1 EF1 0B0 0F2 0B1 EB0 0F3 0B2 0B3 EB1",
        "EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1",
    ]


@pytest.mark.parametrize(
    ("costs", "kinds"),
    [
        (Costs(EB=0), {"F", "B", "EF"}),
        (Costs(EF=0), {"F", "B"}),
        (Costs(B=0, G=1), {"F", "EF", "G"}),
        (Costs(G=1), {"F", "B", "EF", "EB", "G"}),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backbone", ["gpipe", "1f1b"])
def test_kinds_without_cost_do_not_occur(policy, backbone, costs, kinds):
    plan = make_plan(
        PlanRequest(policy=policy, backbone=backbone, pipeline_parallel_size=3, microbatches=7, costs=costs)
    )
    assert {action.kind for actions in plan.ranks for action in actions} == kinds
    assert bool(plan.encoder_shares) == ("EF" in kinds)
    assert bool(plan.generator_shares) == ("G" in kinds)


@given(plan_arguments(latency=True))
@settings(max_examples=150, deadline=None)
def test_any_plan_runs_and_round_trips(arguments):
    plan = make_plan(PlanRequest(**arguments))
    timeline = verify(plan)
    assert timeline.makespan == plan.makespan
    assert rendezvous_completes(plan, timeline)
    assert Plan.from_json(plan.to_json()) == plan
    assert all(Action.parse(str(action)) == action for actions in plan.ranks for action in actions)
    ends = reference_ends(plan)
    for rank, actions in enumerate(plan.ranks):
        for action, end in zip(actions, timeline.ends[rank], strict=True):
            assert ends[rank, str(action)] == pytest.approx(end)


@given(plan_arguments(policies=("nested", "upfront", "recompute")))
@settings(max_examples=150, deadline=None)
def test_a_cut_costs_its_longest_pause_at_most(arguments):
    """A generator's cut costs more only where the last stage's backward comes less than one action after the cut:
    another rank may then still be busy with an action, and begin its share that much later."""
    plan = make_plan(PlanRequest(**arguments))
    costs, kinds, last = arguments["costs"], plan.costs.kinds, plan.stages - 1
    alone = replace(plan, ranks=[[action for action in actions if not action.nested] for actions in plan.ranks])
    timeline, starts, ends = simulate(alone), {}, {}
    for actions, row_starts, row_ends in zip(alone.ranks, timeline.starts, timeline.ends, strict=True):
        for action, start, end in zip(actions, row_starts, row_ends, strict=True):
            if action.stage == last and action.kind != "W":
                starts[action.kind == "F", action.index] = start
                ends[action.kind == "F", action.index] = end
    longest = max(time for row in durations(alone) for time in row)
    allowed = timeline.makespan
    times = {"EF": costs.EF, "EB": costs.EB + costs.EF * plan.recomputes, "G": costs.G}
    for kind in ("EF", "EB", "G"):
        for group, row in zip(plan.groups, plan.shares(kind) if kind in kinds else [], strict=False):
            allowed += times[kind] * len(group) * max(row)
            if kind == "G" and "B" in kinds:
                apart = min(starts[False, m] for m in group) - max(ends[True, m] for m in group)
                allowed += max(0.0, longest - apart)
    assert plan.makespan <= allowed + 1e-9


def test_workload_scales_every_microbatch():
    work = [MicrobatchWork(llm=0.5 + m % 3, encoder=(1.0,) * (m % 4), generator=(0.5,) * (m % 2)) for m in range(12)]
    plan = make_plan(
        PlanRequest(
            pipeline_parallel_size=3, microbatches=12, costs=Costs(G=1), workload=Workload(tuple(work)), group_size=4
        )
    )
    assert plan.encoder_shares == [[1 / 3] * 3] * 3
    timeline = verify(plan, workload=Workload(tuple(work)))
    assert timeline.makespan == plan.makespan
    nested = 3 * 6 * (1 + 2) + 6 * 0.5
    assert sum(plan.makespan - bubble for bubble in timeline.bubbles) == pytest.approx(
        nested + 3 * 3 * sum(entry.llm for entry in work)
    )
    assert plan.peak["encoder_units"][0] <= 4 + 1e-9  # a group's third is 4/3 of the mean microbatch's work


def test_groups_without_work_have_no_actions():
    work = Workload(tuple(MicrobatchWork(encoder=(1.0,) if m < 2 else ()) for m in range(4)))
    plan = make_plan(PlanRequest(pipeline_parallel_size=2, microbatches=4, workload=work))
    assert plan.encoder_shares == [[0.5, 0.5], [0, 0]]
    assert not any(str(action) == "EF1" for actions in plan.ranks for action in actions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0; expected an integer of at least 1"),
        ({"microbatches": 0}, "microbatches is 0; expected"),
        ({"group_size": 0}, "group_size is 0; expected"),
        ({"extra_in_flight": -1}, "extra_in_flight is -1; expected"),
        ({"backbone": "zbv", "virtual_stages": 1}, "virtual_stages is 1; this backbone allows 2"),
        ({"backbone": "looped_bfs", "virtual_stages": 1001}, "this backbone allows 1 to 1000"),
        ({"backbone": "zb1p", "costs": Costs(W=0)}, "costs.I or costs.W is 0; expected times above 0, as zb1p splits"),
        ({"virtual_stages": 2}, "virtual_stages is 2; this backbone allows"),
        ({"policy": "best"}, "policy is 'best'; expected one of nested, upfront, first_stage"),
        ({"backbone": "2f2b"}, "backbone is '2f2b'; expected one of gpipe, 1f1b"),
        ({"encoder_shares": [[1.0, 0.5]] * 2}, "encoder_shares: the shares of group 0 add up to 1.5"),
        ({"encoder_shares": [[1.0, 0.0]]}, "encoder_shares has 1 rows; expected one for each of 2 groups"),
        ({"encoder_shares": [[1.0]] * 2}, "group 0 has 1 shares; expected one per rank"),
        ({"generator_shares": [[2.0, -1.0]] * 2, "costs": Costs(G=1)}, "expected numbers of at least 0"),
        ({"policy": "first_stage", "encoder_shares": [[0.5, 0.5]] * 4}, "expected all of it on rank 0"),
        ({"policy": "disaggregated", "pipeline_parallel_size": 1}, "pipeline_parallel_size is 1; policy disaggregated"),
        (
            {"policy": "disaggregated", "costs": Costs(G=1)},
            "expects at least 3, as encoder, LLM, generator have separate ranks",
        ),
        ({"policy": "disaggregated", "encoder_shares": [[1.0, 0.0]] * 2}, "stage_rank is missing"),
        ({"policy": "disaggregated", "stage_rank": [0]}, "which leaves no rank for EF; expected at least one"),
        ({"policy": "disaggregated", "stage_rank": [2]}, "stage_rank is .2.; expected the rank, 0 .. 1"),
        (
            {"policy": "disaggregated", "stage_rank": [1], "encoder_shares": [[0.5, 0.5]] * 2},
            "expected all of it on rank 0, as the policy is 'disaggregated'",
        ),
        ({"stage_rank": [0, 1]}, "stage_rank is given; expected only with policy disaggregated"),
        ({"costs": Costs(G=1), "extra_in_flight": 0}, "extra_in_flight is too small for 1f1b"),
        ({"workload": Workload((MicrobatchWork(),))}, "the workload has 1 microbatches, the plan has 4"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match="^.*" + message.replace("(", r"\(")):
        make_plan(PlanRequest(**({"pipeline_parallel_size": 2, "microbatches": 4} | arguments)))


@pytest.mark.parametrize(("name", "value"), [("EF", -1.0), ("latency", float("nan")), ("G", float("inf")), ("F", 0.0)])
def test_wrong_costs_are_named(name, value):
    with pytest.raises(ValueError, match=rf"costs\.{name} is "):
        Costs(**{name: value})


def test_a_generator_fits_with_one_microbatch_fewer_than_by_default():
    plan = make_plan(PlanRequest(pipeline_parallel_size=4, microbatches=16, costs=Costs(G=3), extra_in_flight=3))
    assert plan.makespan > plan.ideal
    with pytest.raises(PlanError, match=r"rank 0: 0F7 brings the live LLM microbatches to 8; the limit is 7"):
        verify(
            make_plan(PlanRequest(pipeline_parallel_size=4, microbatches=16, costs=Costs(G=3))), max_llm_microbatches=7
        )
