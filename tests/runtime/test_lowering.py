"""Programs of ranks: no two of them can wait for each other, and each message is sent before it is needed."""

from collections import defaultdict
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from bigmac_lightning.runtime.lowering import Compute, Instruction, Message, Needs, Receive, Send, lower
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Plan
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
            while spots[rank] < len(program) and isinstance(program[spots[rank]], Compute):
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
            else:
                received[instruction.peer, rank, instruction.message.kind].append(instruction.message)
    assert sent == received
    assert all(len(set(messages)) == len(messages) for messages in sent.values())
