"""The search of `bigmac tune`: against an exhaustive search, and what it refuses and counts."""

from dataclasses import replace
from typing import Any

import pytest

from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.ranks import Precision
from bigmac_lightning.schedule.measured_costs import MeanWork, MeasuredCosts
from bigmac_lightning.schedule.rates import Rate
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import ShardingOptions
from bigmac_lightning.tuning.communication import Device
from bigmac_lightning.tuning.evaluating import Evaluator, Problem
from bigmac_lightning.tuning.search import exhaustive, search
from bigmac_lightning.tuning.space import Layout, Space
from tests.test_estimates import TOKENS, TYPICAL, built

SLOW = Device(tflops=1e-2, bandwidth=2e7)
FEW = Space(
    2,
    tokens=(1.0,),
    shardings=(ShardingOptions(), ShardingOptions("zero1", "zero1", "zero1")),
    partitions=("even",),
    policies=("nested", "filled"),
    backbones=("1f1b", "zb1p"),
    pieces=(1,),
)


def problem(memory: float = 1e9, known: MeasuredCosts | None = None) -> Problem:
    module = built()
    assert module.trained_layers
    module.adapt()
    return Problem(module, TYPICAL, 8 * TOKENS, 0, Precision(), memory, SLOW, known=known)


@pytest.mark.parametrize("memory", [1e9, 13e6])
def test_against_an_exhaustive_search(memory: float) -> None:
    found, everything = search(Evaluator(problem(memory)), FEW), exhaustive(Evaluator(problem(memory)), FEW)
    assert found.best[0].seconds <= 1.03 * everything.best[0].seconds
    assert found.simulated < everything.simulated
    assert found.best[0].memory <= memory


def test_the_search_ends_when_its_time_is_over() -> None:
    """But not before something was found."""
    short, whole = (search(Evaluator(problem()), FEW, seconds=seconds) for seconds in (0.0, 600.0))
    assert len(short.best) == 1
    assert short.left > 0
    assert short.simulated < whole.simulated
    assert whole.left == 0
    assert not search(Evaluator(problem(1e6)), FEW, seconds=0.0).left, "nothing fits, so all were looked at"


def test_what_does_not_fit_is_refused_with_reasons() -> None:
    found = search(Evaluator(problem(1e6)), FEW)
    assert not found.best
    assert set(found.refused) == {"weights and optimizer states do not fit"}
    evaluator = Evaluator(problem(memory=1))
    one = Layout(1, 2, ParallelSizes(), ShardingOptions())
    assert evaluator.evaluate(one, ScheduleOptions()).problem == "weights and optimizer states do not fit"
    assert evaluator.why_not(replace(one, size=8)) == "8 stages are more than 4 layers"
    assert evaluator.why_not(replace(one, replicas=3)) == "the tokens of a step cannot be divided so"
    assert "128 tokens of a microbatch cannot be" in evaluator.why_not(replace(one, tokens=1 / 3))
    assert "num_key_value_heads" in evaluator.why_not(replace(one, parallel=ParallelSizes(tensor=4)))
    fsdp = replace(one, sharding=ShardingOptions("fsdp", "fsdp", "fsdp"))
    refused = Evaluator(problem()).evaluate(fsdp, ScheduleOptions("first_stage"))
    assert refused.problem.startswith("sharding.encoders is fsdp, but under policy first_stage")


def test_checkpointing_takes_time_and_saves_memory() -> None:
    evaluator, layout = Evaluator(problem()), Layout(1, 2, ParallelSizes(), ShardingOptions())
    plain = evaluator.evaluate(layout, ScheduleOptions())
    again = evaluator.evaluate(replace(layout, checkpointing=True), ScheduleOptions())
    assert again.seconds > plain.seconds
    assert again.memory < plain.memory
    assert evaluator.evaluate(layout, ScheduleOptions()).seconds == plain.seconds, "it is switched back"


def test_shards_take_less_memory_and_what_is_sent_takes_time() -> None:
    evaluator, whole = Evaluator(problem()), Layout(2, 2, ParallelSizes(), ShardingOptions())
    shards = replace(whole, sharding=ShardingOptions("zero1", "zero1", "zero1"))
    plain, sharded = (evaluator.evaluate(layout, ScheduleOptions()) for layout in (whole, shards))
    assert sharded.memory < plain.memory
    assert plain.sending > 0
    assert plain.seconds == pytest.approx(plain.plan.makespan + plain.sending)  # pyright: ignore
    peers = evaluator.evaluate(Layout(1, 2, ParallelSizes(tensor=2), ShardingOptions()), ScheduleOptions())
    fast = Evaluator(replace(problem(), device=replace(SLOW, bandwidth=1e15)))
    free = fast.evaluate(Layout(1, 2, ParallelSizes(tensor=2), ShardingOptions()), ScheduleOptions())
    assert free.seconds < peers.seconds


def test_measured_times_replace_multiplications() -> None:
    work = MeanWork(TOKENS, TOKENS, TYPICAL.items, TYPICAL.media_rows, TYPICAL.items, TYPICAL.targets, TYPICAL.targets)
    rates: dict[Any, Rate] = {("F", s): Rate(1.0, 0.0, 1.0) for s in (0, 1)}
    rates |= {("B", s): Rate(2.0, 0.0, 2.0) for s in (0, 1)}
    rates |= {("EF", None): Rate(0.5, 0, 1), ("EB", None): Rate(1, 0, 1), ("G", None): Rate(1.5, 0, 1)}
    known = MeasuredCosts(rates, work, (2, 2), 2, message=0.0)
    quick = replace(problem(known=known), device=Device(1.0, 1e15))
    evaluator = Evaluator(quick)
    one = evaluator.evaluate(Layout(1, 1, ParallelSizes(), ShardingOptions()), ScheduleOptions())
    assert one.seconds == pytest.approx(8 * (2 * 3 + 2 * 1.5 + 2 * 1.5), rel=1e-3), "all on one rank"
    again = replace(one.layout, checkpointing=True)
    assert evaluator.evaluate(again, ScheduleOptions()).seconds == pytest.approx(one.seconds + 8 * 2, rel=1e-3)
    pair = evaluator.evaluate(Layout(2, 1, ParallelSizes(), ShardingOptions()), ScheduleOptions())
    assert pair.seconds == pytest.approx(one.seconds / 2, rel=1e-3)
    assert isinstance(evaluator.microbatch(pair.layout), TypicalMicrobatch)
