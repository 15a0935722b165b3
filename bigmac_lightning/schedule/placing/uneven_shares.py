"""Uneven shares for uneven stages: ranks whose stages take less time do more of the encoder and generator work.

Knows busy times and groups; knows nothing of order.
"""

from collections.abc import Iterator, Sequence

from bigmac_lightning.schedule.plan import Plan

Rows = list[list[float]]


def shares_to_try(plan: Plan) -> Iterator[tuple[Rows, Rows]]:
    """Encoder and generator shares per group that are poured in where ranks are idle; none if all stages are the same.

    The more even the encoder's shares, the less memory, and the shorter the first and the last group, while which
    nothing else can be done.
    """
    size, groups, costs = plan.pipeline_parallel_size, len(plan.groups), plan.costs
    even, busy = [1 / size] * size, _busy(plan)
    encoder = costs.EF + ("EB" in costs.kinds) * costs.EB
    if not encoder + costs.G or max(busy) - min(busy) < 1e-9 * max(busy):
        return
    full = pour(busy, encoder + costs.G)
    half = [(one + other) / 2 for one, other in zip(even, full, strict=True)]
    for row in (half, full):
        yield [row] * groups, [row] * groups
    if encoder and groups > 2:
        yield [even, *[full] * (groups - 2), even], [full] * groups
    if encoder and costs.G:
        yield [even] * groups, [pour(busy, costs.G)] * groups


def pour(busy: Sequence[float], work: float) -> list[float]:
    """Each rank's share of some work, so that all ranks whose share is not 0 end together.

    Args:
        busy: per rank, the time it is busy with other work.
        work: the time of the whole work on one rank.
    """
    level, left = 0.0, work
    ranks = sorted(range(len(busy)), key=lambda rank: busy[rank])
    for number, rank in enumerate(ranks, start=1):
        above = busy[ranks[number]] if number < len(ranks) else float("inf")
        level = busy[rank] + left / number
        if level <= above:
            break
        left -= (above - busy[rank]) * number
    return [max(0.0, level - time) / work for time in busy]


def _busy(plan: Plan) -> list[float]:
    """Per rank, the time of its stages on one microbatch."""
    busy = [0.0] * plan.pipeline_parallel_size
    for stage, rank in enumerate(plan.stage_rank):
        busy[rank] += plan.cost("F", stage) + ("B" in plan.costs.kinds) * plan.cost("B", stage)
    return busy
