"""What "auto" chooses: the fastest plan within the limits, alike everywhere, with its reason."""

from typing import Any

import pytest

from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.choose import candidates, choose, ideal_makespan
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

from .plans import reference_ends


def asked(pipeline_parallel_size: int = 4, microbatches: int = 16, **options: Any) -> PlanRequest:
    return PlanRequest(pipeline_parallel_size=pipeline_parallel_size, microbatches=microbatches, **options)


def test_picks_the_fastest_of_all():
    """Against times by a reference that polls the ranks, of all combinations, as they are listed here."""
    request = asked(backbone="auto", group_size="auto", costs=Costs(F=3, B=5, I=2, W=3, EF=2, EB=3))
    choice = choose(request)
    stages = {"interleaved_1f1b": (2, 4), "looped_bfs": (2, 4), "zbv": (2,), "dualpipev": (2,)}
    expected = {(name, v, size) for name in BACKBONES for v in stages.get(name, (1,)) for size in (2, 4, 8)}
    assert {(c.backbone, c.virtual_stages, c.group_size) for c in choice.candidates} == expected
    ends: list[float] = []
    for candidate in choice.candidates:
        plan = candidate.plan
        assert plan is not None
        assert (plan.backbone, plan.virtual_stages) == (candidate.backbone, candidate.virtual_stages)
        assert max(map(len, plan.groups)) == candidate.group_size
        assert plan.costs.F * plan.virtual_stages == 3, "the costs are those of all the stages of a rank together"
        assert plan.costs.EF == 2
        ends.append(max(reference_ends(plan).values()))
        assert ends[-1] == pytest.approx(plan.makespan)
    assert ends == sorted(ends)
    assert choice.best == choice.candidates[0]
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
    choice = choose(asked(policy=policy, backbone="auto", group_size="auto", **caps))
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
    even = choose(asked(group_size="auto"))
    assert even.best.group_size == 4, "all group sizes take as long"
    assert choose(asked(1, 8, backbone="auto")).best.virtual_stages == 1
    both = candidates(asked(), ["nested"], ["gpipe", "1f1b"], "auto")
    assert [candidate.backbone for candidate in both] == ["1f1b", "gpipe"], "as fast, with less memory"


@pytest.mark.parametrize(("layers", "most"), [(4, 1), (8, 2), (16, 4), (12, 1), (None, 4)])
def test_stages_are_limited_by_the_layers(layers, most):
    choice = choose(asked(layers=layers, backbone="auto"))
    made = [candidate.virtual_stages for candidate in choice.candidates if candidate.plan is not None]
    assert max(made) == most
    problems = " ".join(candidate.problem for candidate in choice.candidates)
    assert ("stages are more than the LLM's 4 layers" in problems) == (layers == 4)
    assert ("the LLM's 12 layers cannot be divided into 8 stages of the same size" in problems) == (layers == 12)


def test_named_parts_stay():
    choice = choose(asked(4, 8, policy="filled", backbone="interleaved_1f1b", virtual_stages="auto", group_size=2))
    assert {(c.backbone, c.group_size) for c in choice.candidates} == {("interleaved_1f1b", 2)}
    assert {c.virtual_stages for c in choice.candidates} == {2, 4}
    two = choose(asked(4, 8, backbone="auto", virtual_stages=2))
    assert {c.virtual_stages for c in two.candidates} == {2}
    assert (
        "refused: 1f1b with 2 stages per rank, group_size 4: virtual_stages is 2; this backbone allows 1" in two.reason
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="is auto; expected values, as `choose` gives them"):
        make_plan(asked(group_size="auto"))
    with pytest.raises(ValueError, match=r"give no plan that is possible:\n  gpipe, group_size 4: rank 0: EF0 brings"):
        choose(asked(backbone="auto", max_encoder_units=0.1))
    with pytest.raises(ValueError, match="policy is 'best'; expected one of nested"):
        choose(asked(policy="best", backbone="auto"))
    with pytest.raises(ValueError, match="backbone is 'best'; expected one of gpipe"):
        choose(asked(backbone="best", group_size="auto"))
    with pytest.raises(ValueError, match="3 stages are more than the LLM's 2 layers"):
        choose(asked(3, 6, layers=2, backbone="auto", group_size="auto"))


def test_all_policies_take_a_workload_and_one_ideal():
    work = Workload(tuple(MicrobatchWork(0.5 + m % 3, (1.0,) * (m % 4), (0.5,) * (m % 2)) for m in range(8)))
    request = asked(3, 8, costs=Costs(G=1), workload=work)
    found = candidates(request, list(POLICIES), list(BACKBONES), "auto")
    assert all(candidate.plan is not None for candidate in found)
    assert {c.group_size for c in found if c.policy == "first_stage"} == {1}
    plain = make_plan(PlanRequest(pipeline_parallel_size=3, microbatches=8, costs=Costs(G=1), workload=work))
    assert ideal_makespan(request) == plain.ideal
