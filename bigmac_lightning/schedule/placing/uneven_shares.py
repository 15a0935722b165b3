"""Uneven shares for uneven stages: ranks whose stages take less time do more of the encoder and generator work."""

from collections.abc import Iterator, Sequence

from bigmac_lightning.schedule.plan import Plan

Rows = list[list[float]]


def uneven_shares(plan: Plan) -> Iterator[tuple[Rows, Rows]]:
    """Encoder and generator shares per group that a policy may try; none if all stages take the same time.

    `full` lets all ranks end together. It also makes the first and the last group longer, for which every rank waits,
    and it takes more memory on the ranks with more work; so the halfway shares, and full ones only in the middle of
    the batch or only for the generator, are tried as well.
    """
    size, groups, costs = plan.pipeline_parallel_size, len(plan.groups), plan.costs
    even, busy = [1 / size] * size, _busy(plan)
    encoder = costs.EF + ("EB" in costs.kinds) * costs.EB
    if not encoder + costs.G or max(busy) - min(busy) < 1e-9 * max(busy):
        return
    full = balanced_shares(busy, encoder + costs.G)
    half = [(one + other) / 2 for one, other in zip(even, full, strict=True)]
    for row in (half, full):
        yield [row] * groups, [row] * groups
    if encoder and groups > 2:
        yield [even, *[full] * (groups - 2), even], [full] * groups
    if encoder and costs.G:
        yield [even] * groups, [balanced_shares(busy, costs.G)] * groups


def balanced_shares(busy: Sequence[float], time: float) -> list[float]:
    """Each rank's share of some work, so that all ranks whose share is not 0 end together.

    The least busy ranks are brought up to the next busier one, until nothing is left (the water-filling algorithm of
    resource allocation).

    Args:
        busy: per rank, the time for which it is busy with other work.
        time: how long the whole work would take on one rank.
    """
    level, left = 0.0, time
    ranks = sorted(range(len(busy)), key=lambda rank: busy[rank])
    for number, rank in enumerate(ranks, start=1):
        above = busy[ranks[number]] if number < len(ranks) else float("inf")
        level = busy[rank] + left / number
        if level <= above:
            break
        left -= (above - busy[rank]) * number
    return [max(0.0, level - other) / time for other in busy]


def _busy(plan: Plan) -> list[float]:
    """Per rank, the time of its stages on one microbatch."""
    busy = [0.0] * plan.pipeline_parallel_size
    for stage, rank in enumerate(plan.stage_rank):
        busy[rank] += plan.cost("F", stage) + ("B" in plan.costs.kinds) * plan.cost("B", stage)
    return busy
