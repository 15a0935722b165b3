"""Bytes from what is alive: sizes, peaks, refusals, and what is left for encoder units."""

import re

import pytest

from bigmac_lightning.schedule.budget import MemoryBudget, parse_size, size_text
from bigmac_lightning.schedule.liveness import live_encoder_units, live_llm_microbatches
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs, PlanError
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.verify import verify

SHAPE = {"pipeline_parallel_size": 4, "microbatches": 16}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("1.5 gb", 1_500_000_000),
        ("300mib", 300 * 2**20),
        ("2TB", 2 * 10**12),
        ("0.5kB", 500),
        ("5B", 5),
        ("7", 7),
        (7, 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "3 XiB", "1.5.2GB", "inf", -4, 1.5e300])
def test_wrong_sizes_are_named(text):
    with pytest.raises(ValueError, match=r"^memory\.static is .*; expected bytes, or a size such as 16GiB"):
        MemoryBudget(static=text)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2.0**41, "2 TiB")])
def test_sizes_are_told(size, text):
    assert size_text(size) == text


def test_adds_up_what_is_alive_at_the_same_moment():
    memory, plan = MemoryBudget(None, "3MiB", "2MiB", "1MiB"), make_plan(PlanRequest(**SHAPE))
    units, microbatches = live_encoder_units(plan), live_llm_microbatches(plan)
    for rank, peak in enumerate(memory.peaks(plan)):
        expected = max(3 * u + 2 * m for u, m in zip(units[rank], microbatches[rank], strict=True)) + 1
        assert peak == expected * 2**20
    frozen = make_plan(PlanRequest(**SHAPE, policy="upfront", costs=Costs(EB=0)))
    assert frozen.peak == {"encoder_units": [1, 1, 1, 1], "llm_microbatches": [4, 3, 2, 1]}
    assert memory.peaks(frozen) == [size * 2**20 for size in (9, 7, 5, 4)], "features first, then LLM microbatches"


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (
            MemoryBudget("10GiB", "2GiB", "1GiB", "3GiB"),
            "rank 0: EF1 brings the memory to 11 GiB (2 encoder units, 4 LLM microbatches, 3 GiB static); "
            "the budget is 10 GiB: use a smaller group_size",
        ),
        (MemoryBudget("3GiB", 0, "1GiB"), "the budget is 3 GiB: use a backbone with fewer LLM microbatches in flight"),
        (MemoryBudget("1GiB", static="2GiB"), "the budget is 1 GiB: memory.static alone is above it"),
    ],
)
def test_plans_above_it_are_refused(memory, message):
    plan = make_plan(PlanRequest(**SHAPE))
    with pytest.raises(PlanError, match=re.escape(message)):
        verify(plan, memory=memory)
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(PlanRequest(**SHAPE, memory=memory))


def test_filled_uses_what_is_left():
    costs, makespans = Costs(EF=4, EB=8), []
    for budget in (8, 10, 12):
        memory = MemoryBudget(f"{budget}GiB", "2GiB", "1GiB")
        plan = make_plan(PlanRequest(policy="filled", **SHAPE, costs=costs, memory=memory))
        assert max(memory.peaks(plan)) <= budget * 2**30
        assert max(plan.peak["encoder_units"]) == (budget - 4) / 2
        makespans.append(plan.makespan)
    assert makespans[0] > makespans[1] >= makespans[2]
    both = make_plan(PlanRequest(policy="filled", **SHAPE, costs=costs, max_encoder_units=2, memory=memory))
    assert max(both.peak["encoder_units"]) == 2
    untold = make_plan(PlanRequest(policy="filled", **SHAPE, costs=costs, memory=MemoryBudget(encoder_unit="2GiB")))
    assert untold == make_plan(PlanRequest(policy="filled", **SHAPE, costs=costs))
