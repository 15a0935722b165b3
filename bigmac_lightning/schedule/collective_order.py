"""Orders a plan's actions for ranks that meet in collectives inside nested actions.

If the weights of an encoder or a generator lie in shards on all ranks of a pipeline, each EF, EB or G of a group
gathers them. Then no rank can end its action before all ranks have started theirs. A plan that is free of deadlock
without this need not be so with it: ``verify`` checks the nested actions' order only pairwise.
"""

import heapq
from collections.abc import Collection, Sequence

from bigmac_lightning.schedule.dataflow import Dataflow
from bigmac_lightning.schedule.plan import Plan, PlanError


def collective_order(plan: Plan, kinds: Collection[str], order: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return all actions as (rank, position in its list), in a total order in which the ranks' actions of one kind and
    group stand side by side.

    If there is such an order, no deadlock is possible: take the ranks' actions of a kind and group as one event that
    all ranks take part in; the earliest event of the order that has not happened yet can always happen.

    Args:
        plan: a verified plan, whose actions of `kinds` are not cut into pieces.
        kinds: the kinds (EF, EB, G) inside which all ranks meet.
        order: a total order without regard to that, such as ``Timeline.order``; it decides where there is a choice.

    Raises:
        PlanError: there is no such order, or an action of `kinds` is missing on a rank or cut into pieces.
    """
    flow, place = Dataflow(plan), {position: i for i, position in enumerate(order)}
    event_of: list[int] = []
    events: dict[tuple[str, int], int] = {}
    members: list[list[int]] = []
    for number, action in enumerate(flow.actions):
        met = action.nested and action.kind in kinds
        event = events.setdefault((action.kind, action.index), len(members)) if met else len(members)
        if event == len(members):
            members.append([])
        members[event].append(number)
        event_of.append(event)
    _check_everywhere(flow, [members[event] for event in events.values()], len(plan.ranks))
    waiting, later = [0] * len(members), [list[int]() for _ in members]
    firsts = set(flow.first)
    for number, needs in enumerate(flow.needs):
        before = needs if number in firsts else [*needs, number - 1]
        for need in before:
            later[event_of[need]].append(event_of[number])
            waiting[event_of[number]] += 1
    positions = [min(place[flow.position(number)] for number in members[event]) for event in range(len(members))]
    ready = [(positions[event], event) for event in range(len(members)) if not waiting[event]]
    heapq.heapify(ready)
    found: list[tuple[int, int]] = []
    while ready:
        _, event = heapq.heappop(ready)
        found += [flow.position(number) for number in members[event]]
        for other in later[event]:
            waiting[other] -= 1
            if not waiting[other]:
                heapq.heappush(ready, (positions[other], other))
    if len(found) < len(flow.actions):
        stuck = next(flow.actions[members[event][0]] for event in events.values() if waiting[event])
        raise PlanError(f"ranks cannot meet in {stuck}: some of them need what others compute only after it")
    return found


def _check_everywhere(flow: Dataflow, events: list[list[int]], size: int) -> None:
    for numbers in events:
        action = flow.actions[numbers[0]]
        if any(flow.actions[number].pieces > 1 for number in numbers):
            raise PlanError(
                f"{action.kind}{action.index} is cut into pieces, but all ranks must meet in it; expected 1"
            )
        if len(numbers) < size:
            absent = min(set(range(size)) - {flow.ranks[number] for number in numbers})
            raise PlanError(f"rank {absent}: {action} is missing, but all ranks must meet in it")
