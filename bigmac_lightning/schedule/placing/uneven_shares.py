"""Uneven shares for uneven stages: ranks whose LLM stages take less time get more of the encoder and generator work."""

from collections.abc import Iterator, Sequence

from bigmac_lightning.schedule.plan import Plan

Rows = list[list[float]]
"""Per group, each rank's share."""


def uneven_shares(plan: Plan) -> Iterator[tuple[Rows, Rows]]:
    """Yield (encoder shares, generator shares) that a policy may try; nothing if all ranks' stages take the same time.

    With the shares `full`, all ranks end at the same time. But these shares make the EFs of the first group and the EBs
    of the last group longer, for which all ranks wait, and they take more memory on the ranks with more work. Therefore
    other shares are yielded as well: those halfway between `even` and `full`; `full` only in the middle of the batch;
    and `full` only for the generator.
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
    """Return each rank's share of some work, such that all ranks whose share is not 0 end at the same time.

    This is the water-filling algorithm of resource allocation: the least busy ranks get work until they are as busy as
    the next rank, and so on until no work is left.

    Args:
        busy: per rank, the time for which it is busy with other work.
        time: time that the whole work would take on one rank, in the same unit.
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
    """Return, per rank, the time of its stages' forwards and backwards on one mean microbatch."""
    busy = [0.0] * plan.pipeline_parallel_size
    for stage, rank in enumerate(plan.stage_rank):
        busy[rank] += plan.cost("F", stage) + ("B" in plan.costs.kinds) * plan.cost("B", stage)
    return busy
