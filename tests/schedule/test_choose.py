"""What auto picks: the fastest within the caps, alike everywhere, with its reason."""

import pytest

from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.choose import Case, candidates, choose
from bigmac_lightning.schedule.make import POLICIES, make_plan
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload


def test_picks_the_fastest_of_all():
    case = Case(4, 16, Costs())
    choice = choose(case, "nested", group_size="auto")
    assert {candidate.backbone for candidate in choice.candidates} == set(BACKBONES)
    assert {candidate.group_size for candidate in choice.candidates} == {2, 4, 8}
    assert choice.best.plan is not None
    for candidate in choice.candidates:
        assert candidate.plan is not None
        assert choice.best.plan.makespan <= candidate.plan.makespan
        again = make_plan(
            backbone=candidate.backbone,
            virtual_stages=candidate.virtual_stages,
            group_size=candidate.group_size,
            pipeline_parallel_size=4,
            microbatches=16,
            costs=Costs().per_stage(candidate.virtual_stages),
        )
        assert again == candidate.plan
    assert [str(c) for c in choice.candidates] == [str(c) for c in choose(case, "nested", group_size="auto").candidates]
    assert choice.reason.splitlines()[0] == f"chosen for policy nested: {choice.best}; the fastest of 27:"
    assert len(choice.reason.splitlines()) == 7


@pytest.mark.parametrize(
    "caps",
    [
        {"max_encoder_units": 1.5},
        {"max_llm_microbatches": 4},
        {"memory": MemoryBudget("9GiB", "2GiB", "1GiB", "1GiB")},
        {"max_encoder_units": 2, "max_llm_microbatches": 4},
    ],
)
@pytest.mark.parametrize("policy", ["nested", "filled"])
def test_keeps_the_caps(caps, policy):
    choice = choose(Case(4, 16, Costs(), **caps), policy, group_size="auto")
    refused = [candidate for candidate in choice.candidates if candidate.plan is None]
    assert refused
    for candidate in refused:
        assert "brings the live" in candidate.problem or "brings the memory to" in candidate.problem
    assert f"refused: {refused[0]}: {refused[0].problem}" in choice.reason
    assert choice.best.plan is not None
    if "memory" in caps:
        assert 0 < max(choice.best.memory) <= 9 * 2**30
        assert " GiB" in choice.reason


def test_equal_times_go_to_the_simpler():
    even = choose(Case(4, 16, Costs()), "nested", "1f1b", group_size="auto")
    assert even.best.group_size == 4, "all group sizes take as long"
    assert choose(Case(1, 8, Costs())).best.virtual_stages == 1
    both = candidates(Case(4, 16, Costs()), ["nested"], ["gpipe", "1f1b"])
    assert [candidate.backbone for candidate in both] == ["1f1b", "gpipe"], "as fast, with less memory"


@pytest.mark.parametrize(("layers", "most"), [(4, 1), (8, 2), (16, 4), (12, 1), (None, 4)])
def test_stages_are_limited_by_the_layers(layers, most):
    choice = choose(Case(4, 16, Costs(), layers=layers), backbone="auto")
    made = [candidate.virtual_stages for candidate in choice.candidates if candidate.plan is not None]
    assert max(made) == most
    problems = " ".join(candidate.problem for candidate in choice.candidates)
    assert ("stages are more than the LLM's 4 layers" in problems) == (layers == 4)
    assert ("the LLM's 12 layers do not make 8 stages of the same size" in problems) == (layers == 12)


def test_named_parts_stay():
    choice = choose(Case(4, 8, Costs()), "filled", "interleaved_1f1b", "auto", 2)
    assert {(c.backbone, c.group_size) for c in choice.candidates} == {("interleaved_1f1b", 2)}
    assert {c.virtual_stages for c in choice.candidates} == {2, 4}
    two = choose(Case(4, 8, Costs()), "nested", "auto", 2)
    assert {c.virtual_stages for c in two.candidates} == {2}
    assert (
        "refused: 1f1b with 2 stages per rank, group_size 4: virtual_stages is 2; this backbone allows 1" in two.reason
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"give no plan that is possible:\n  gpipe, group_size 4: rank 0: EF0 brings"):
        choose(Case(4, 16, Costs(), max_encoder_units=0.1))
    with pytest.raises(ValueError, match="policy is 'best'; expected one of nested"):
        choose(Case(4, 16, Costs()), "best")
    with pytest.raises(ValueError, match="backbone is 'best'; expected one of gpipe"):
        choose(Case(4, 16, Costs()), backbone="best")
    with pytest.raises(ValueError, match="3 stages are more than the LLM's 2 layers"):
        choose(Case(3, 6, Costs(), layers=2), group_size="auto")


def test_all_policies_take_a_workload_and_one_ideal():
    work = Workload(tuple(MicrobatchWork(0.5 + m % 3, (1.0,) * (m % 4), (0.5,) * (m % 2)) for m in range(8)))
    case = Case(3, 8, Costs(G=1), work)
    found = candidates(case, list(POLICIES), list(BACKBONES))
    assert all(candidate.plan is not None for candidate in found)
    assert {c.group_size for c in found if c.policy == "first_stage"} == {1}
    plain = make_plan(pipeline_parallel_size=3, microbatches=8, costs=Costs(G=1), workload=work)
    assert case.ideal() == plain.ideal
