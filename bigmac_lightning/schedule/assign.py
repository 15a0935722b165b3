"""Chooses the rank that computes each item of encoder or generator work, from the items' times alone."""

from collections.abc import Sequence


def assign(
    groups: Sequence[Sequence[float]], ranks: Sequence[int], busy: Sequence[Sequence[float]] | None = None
) -> list[list[int]]:
    """Assign every item of every group to a rank: the longest item first, each to the rank with the least load so far.

    This is the LPT rule (longest processing time first; Graham 1969), with the loads of earlier groups carried over: a
    rank that did more than others in one group does less in the next ones. But at most an even share of a group is
    carried over into it, so that no rank gets more of a group than two even shares and one item, and the group's
    activations stay spread over the ranks. Ties go to the first item and to the first rank, so that the same times give
    the same owners in every process.

    Args:
        groups: per group, the time of each of its items, in any unit.
        ranks: the ranks that may own items.
        busy: per group, the time for which each of `ranks` computes LLM stages meanwhile, in the same unit. ``None``
            means that this time is the same on all ranks.

    Returns: per group, the owner of each item, which is an element of `ranks`.
    """
    total = [0.0] * len(ranks)
    owners: list[list[int]] = []
    for group, times in enumerate(groups):
        if busy is not None:
            total = [before + other for before, other in zip(total, busy[group], strict=True)]
        even_share, least = sum(times) / len(ranks), min(total)
        load = [min(before - least, even_share) for before in total]
        owner_of_item = [0] * len(times)
        for item in sorted(range(len(times)), key=lambda item: (-times[item], item)):
            position = load.index(min(load))
            owner_of_item[item] = ranks[position]
            load[position] += times[item]
            total[position] += times[item]
        owners.append(owner_of_item)
    return owners
