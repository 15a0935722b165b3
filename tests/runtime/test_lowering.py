"""Programs of ranks: no two of them can wait for each other, and each message is sent before it is needed."""

from collections import defaultdict
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from bigmac_lightning.runtime.lowering import (
    Compute,
    Done,
    Instruction,
    Message,
    Needs,
    Receive,
    Send,
    lower,
    with_hints,
)
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.request import PlanRequest
from bigmac_lightning.schedule.verify import verify
from tests.schedule.plans import plan_arguments


def needs_of(plan: Plan, seed: int) -> Needs:
    """Everything is trained, or something."""
    random, stages = Random(seed), len(plan.stage_rank)
    microbatches = sum(map(len, plan.groups))
    if not seed:
        return Needs((True,) * stages, (True,) * microbatches, generator=True)
    weights = tuple(random.random() < 0.5 for _ in range(stages))
    return Needs(weights, tuple(random.random() < 0.5 for _ in range(microbatches)), random.random() < 0.5)


def completes(programs: list[list[Instruction]]) -> bool:
    """Whether programs end if each send blocks until the other rank stands at just the matching receive, as NCCL's do
    where a message is larger than its buffers."""
    spots = [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while spots[rank] < len(program) and isinstance(program[spots[rank]], Compute | Done):
                spots[rank] += 1
                moved = True
            if spots[rank] == len(program):
                continue
            here = program[spots[rank]]
            if isinstance(here, Send):
                other = programs[here.peer][spots[here.peer] :][:1]
                if other == [Receive(here.message, rank)]:
                    spots[rank] += 1
                    spots[here.peer] += 1
                    moved = True
    return spots == [len(program) for program in programs]


@given(plan_arguments(latency=True), st.integers(0, 5))
@settings(max_examples=120, deadline=None)
def test_programs_end_even_if_every_send_blocks(arguments: dict, seed: int) -> None:
    plan = make_plan(PlanRequest(**arguments))
    programs = lower(plan, verify(plan).order, needs_of(plan, seed))
    assert completes(programs)
    for rank, program in enumerate(programs):
        assert [i.action for i in program if isinstance(i, Compute)] == plan.ranks[rank]


@given(plan_arguments(latency=True), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_messages_of_two_ranks_are_received_in_the_order_they_are_sent(arguments: dict, seed: int) -> None:
    plan = make_plan(PlanRequest(**arguments))
    programs = lower(plan, verify(plan).order, needs_of(plan, seed))
    sent: dict[tuple[int, int, str], list[Message]] = defaultdict(list)
    received: dict[tuple[int, int, str], list[Message]] = defaultdict(list)
    for rank, program in enumerate(programs):
        produced: set[Message] = set()
        for instruction in program:
            if isinstance(instruction, Compute):
                produced |= set(instruction.produces)
            elif isinstance(instruction, Send):
                assert instruction.message in produced, "it is sent before it is made"
                sent[rank, instruction.peer, instruction.message.kind].append(instruction.message)
            elif isinstance(instruction, Receive):
                received[instruction.peer, rank, instruction.message.kind].append(instruction.message)
    assert sent == received
    assert all(len(set(messages)) == len(messages) for messages in sent.values())


def test_gradients_of_a_part_are_summed_as_soon_as_they_are_there() -> None:
    """A generator's long before the step ends, and each part's after its last action."""
    request = PlanRequest(pipeline_parallel_size=4, microbatches=16, backbone="zb1p", costs=Costs(G=3))
    plan = make_plan(request)
    for program in (with_hints(one, ()) for one in lower(plan, verify(plan).order, needs_of(plan, 0))):
        for part, kinds in (("generators", "G"), ("llm", "BIW"), ("encoders", "EB")):
            kinds = (kinds,) if part != "llm" else tuple(kinds)
            last = max(i for i, one in enumerate(program) if isinstance(one, Compute) and one.action.kind in kinds)
            (end,) = (i for i, one in enumerate(program) if one == Done(part))
            assert all(isinstance(one, Send | Done) for one in program[last + 1 : end])
            assert end > last
            if part == "generators":
                assert sum(isinstance(one, Compute) for one in program[end:]) >= 4
