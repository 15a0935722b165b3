"""Broken plans are refused, with the rank and the action named."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs, Plan, PlanError
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.schedule.verify import verify

from .plans import plan_arguments, predecessors, reference_ends


def edited(plan: Plan, rank: int, texts: str) -> Plan:
    ranks = list(plan.ranks)
    ranks[rank] = [Action.parse(text) for text in texts.split()]
    return replace(plan, ranks=ranks)


@pytest.fixture
def plan() -> Plan:
    """EF0 0F0 0F1 EF1 0B0 0F2 0B1 EB0 0F3 0B2 0B3 EB1 | EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1"""
    return make_plan(PlanRequest(pipeline_parallel_size=2, microbatches=4))


@pytest.mark.parametrize(
    ("rank", "texts", "message"),
    [
        (1, "EF0 1B0 1F0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1", "rank 1: 1B0 is placed before 1F0, which it needs"),
        (0, "0F0 EF0 0F1 EF1 0B0 0F2 0B1 EB0 0F3 0B2 0B3 EB1", "rank 0: 0F0 is placed before EF0, which it needs"),
        (0, "EF0 0F0 0F1 EF1 0B0 0F2 EB0 0B1 0F3 0B2 0B3 EB1", "rank 0: EB0 is placed before 0B1, which it needs"),
        (1, "EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3", "rank 1: EB1 is missing"),
        (1, "EF0 1F0 1B0 EF1 1F1 1B1 1F2 EB0 1F3 1B3 EB1", "rank 1: 1B2 is missing"),
        (1, "EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 1B2 EB0 1F3 1B3 EB1", "rank 1: 1B2 occurs twice"),
        (1, "EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1 0F0", "rank 1: 0F0 belongs to rank 0"),
        (1, "EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1 2F0", "rank 1: 2F0 does not exist"),
        (1, "EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1 1F4", "rank 1: 1F4 does not exist"),
        (
            1,
            "EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1 EF2",
            "rank 1: EF2 does not exist; expected groups 0 .. 1",
        ),
        (1, "EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1 G0", "rank 1: G0 cannot occur, as costs.G"),
        (1, "EF1 1F0 1B0 EF0 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1", "rank 1: EF1 is placed before EF0, rank 0 has them"),
        (1, "EF0 1F0 1I0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1", "rank 1: both 1B0 and 1I0 occur"),
        (1, "EF0 1F0 1I0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1", "rank 1: 1W0 is missing"),
        (1, "EF0 1F0 1W0 1I0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1", "rank 1: 1W0 is placed before 1I0, which it needs"),
        (1, "EF0.0/2 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1", "rank 1: EF0.1/2 is missing"),
        (
            1,
            "EF0.0/2 EF0 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1",
            "rank 1: EF0 is cut into pieces of different sizes",
        ),
        (1, "EF0.0/2 EF0.1/2 1F0 1B0 EF1 1F1 1B1 1F2 1B2 EB0 1F3 1B3 EB1", "rank 1: EB0 has no EF0; expected the same"),
    ],
)
def test_edits_are_refused(plan, rank, texts, message):
    with pytest.raises(PlanError, match="^" + re.escape(message)):
        verify(edited(plan, rank, texts))


def test_a_deadlock_shows_where_every_rank_is_stuck(plan):
    broken = edited(plan, 0, "EF0 0F0 EF1 0B0 0F1 0F2 0B1 EB0 0F3 0B2 0B3 EB1")
    broken = edited(broken, 1, "EF0 1F0 EF1 1F1 1B0 1B1 1F2 1B2 EB0 1F3 1B3 EB1")
    with pytest.raises(PlanError) as raised:
        verify(broken)
    assert str(raised.value).splitlines() == [
        "the plan cannot progress; waiting: rank 0 at 0B0 for 1B0 of rank 1; rank 1 at 1F1 for 0F1 of rank 0",
        "  rank 0, step 3: EF0 0F0 EF1 >0B0< 0F1 0F2 0B1 ..",
        "  rank 1, step 3: EF0 1F0 EF1 >1F1< 1B0 1B1 1F2 ..",
    ]


def test_pieces_and_halves_are_understood(plan):
    halves = "EF0.0/2 EF0.1/2 1F0 1I0 EF1 1F1 1B1 1W0 1F2 1B2 EB0.0/2 EB0.1/2 1F3 1B3 EB1"
    timeline = verify(edited(plan, 1, halves))
    assert timeline.makespan == pytest.approx(plan.makespan)
    assert timeline.encoder_units == [2, 2]
    assert timeline.llm_microbatches == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [[0, 1], [2]]}, "groups must contain each of the microbatches 0 .. 3 exactly once"),
        ({"groups": [[0, 1], [2, 2, 3]]}, "groups must contain each of the microbatches"),
        ({"groups": [[0, 1], [2, 3], []]}, "groups: group 2 is empty"),
        ({"stage_rank": [0, 0]}, "stage_rank gives rank 0 2 stages; expected 1"),
        ({"stage_rank": [0, 2]}, "stage_rank is [0, 2]; expected the rank, 0 .. 1, of each stage"),
        ({"stage_rank": []}, "stage_rank is []; expected the rank"),
        ({"stage_rank": [0]}, "rank 1: 1F0 does not exist; expected stages 0 .. 0"),
        ({"ranks": []}, "ranks has 0 lists; expected one for each of 2 ranks"),
        ({"encoder_shares": []}, "encoder_shares has 0 rows; expected one for each of 2 groups"),
        ({"encoder_shares": [[0.5, 0.4]] * 2}, "encoder_shares: the shares of group 0 add up to 0.9"),
        ({"generator_shares": [[0.5, 0.5]] * 2}, "generator_shares has 2 rows; expected none, as its costs are 0"),
        ({"encoder_shares": [[1, 0], [0.5, 0.5]]}, "rank 1: EF0 cannot be on this rank, whose share"),
        ({"microbatches": 0}, "microbatches is 0; expected at least 1"),
    ],
)
def test_wrong_headers_are_refused(plan, changes, message):
    with pytest.raises(PlanError, match="^" + re.escape(message)):
        verify(replace(plan, **changes))


def test_limits_name_the_action_that_breaks_them(plan):
    verify(plan, max_encoder_units=2, max_llm_microbatches=2)
    with pytest.raises(PlanError, match=r"^rank 0: EF1 brings the live encoder units to 2; the limit is 1\.5"):
        verify(plan, max_encoder_units=1.5)
    with pytest.raises(PlanError, match=r"^rank 0: 0F1 brings the live LLM microbatches to 2; the limit is 1"):
        verify(plan, max_llm_microbatches=1)


@given(plan_arguments(), st.data())
@settings(max_examples=100, deadline=None)
def test_lost_doubled_and_moved_actions_are_named(arguments, data):
    plan = make_plan(PlanRequest(**arguments))
    rank = data.draw(st.sampled_from([rank for rank, actions in enumerate(plan.ranks) if actions]))
    position = data.draw(st.integers(0, len(plan.ranks[rank]) - 1))
    action = plan.ranks[rank][position]
    target = data.draw(st.integers(0, len(plan.ranks) - 1))
    ranks = [list(actions) for actions in plan.ranks]
    if data.draw(st.booleans()):
        del ranks[rank][position]
    if data.draw(st.booleans()):
        ranks[target].insert(data.draw(st.integers(0, len(ranks[target]))), action)
    assume(sorted(map(str, ranks[rank])) != sorted(map(str, plan.ranks[rank])) or target != rank)
    assume(ranks != plan.ranks)
    with pytest.raises(PlanError, match=rf"rank \d: {re.escape(str(action))} "):
        verify(replace(plan, ranks=ranks))


@given(plan_arguments(), st.data())
@settings(max_examples=100, deadline=None)
def test_actions_placed_before_what_they_need_are_named(arguments, data):
    plan = make_plan(PlanRequest(**arguments))
    local = [
        (rank, action, need)
        for (rank, action), needs in predecessors(plan).items()
        for needed_rank, need in needs
        if needed_rank == rank
    ]
    assume(local)
    rank, action, need = data.draw(st.sampled_from(local))
    ranks = [list(actions) for actions in plan.ranks]
    ranks[rank].remove(action)
    ranks[rank].insert(ranks[rank].index(need), action)
    with pytest.raises(PlanError, match=rf"rank {rank}: {action} is placed before \S+, which it needs"):
        verify(replace(plan, ranks=ranks))


@given(plan_arguments(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_exactly_the_shuffles_that_run_are_accepted_by_the_simulation(arguments, random):
    """Against a reference that polls the ranks: a plan runs there if and only if `simulate` gives it a timeline."""
    plan = make_plan(
        PlanRequest(**(arguments | {"microbatches": min(arguments["microbatches"], 3), **_no_shares(arguments)}))
    )
    actions = random.choice([actions for actions in plan.ranks if actions])
    one, other = random.randrange(len(actions)), random.randrange(len(actions))
    actions[one], actions[other] = actions[other], actions[one]
    runs = len(reference_ends(plan)) == sum(map(len, plan.ranks))
    if runs:
        simulate(plan)
    else:
        with pytest.raises(PlanError, match="cannot progress"):
            simulate(plan)


def _no_shares(arguments: dict[str, object]) -> dict[str, None]:
    return {key: None for key in ("encoder_shares", "generator_shares") if key in arguments}


def test_order_is_by_end_time_and_respects_every_need():
    plan = make_plan(PlanRequest(pipeline_parallel_size=4, microbatches=9, costs=Costs(G=2, latency=0.25, B=1.7)))
    timeline = verify(plan)
    ends = [timeline.ends[rank][position] for rank, position in timeline.order]
    assert ends == sorted(ends)
    place = {(rank, plan.ranks[rank][position]): n for n, (rank, position) in enumerate(timeline.order)}
    for key, needs in predecessors(plan).items():
        assert all(place[need] < place[key] for need in needs)
    for rank in range(4):
        assert [p for r, p in timeline.order if r == rank] == list(range(len(plan.ranks[rank])))
