"""Which rank does which item of encoder or generator work.

Knows times of items, and of what else a rank has to do; knows nothing of plans, media or models.
"""

from collections.abc import Sequence


def assign(
    groups: Sequence[Sequence[float]], ranks: Sequence[int], busy: Sequence[Sequence[float]] | None = None
) -> list[list[int]]:
    """Give every item of every group to a rank: the longest first, each to the rank that has the least to do so far.

    What a rank has done more than others in one group it does less in the next ones. To keep a group's activations
    spread, no more of that counts in a group than an even share of it: so no rank ever gets more of a group than two
    even shares and one item. Ties go to the item, and to the rank, that comes first: the same times give the same
    owners in every process.

    Args:
        groups: per group, the time of each of its items.
        ranks: who may do them.
        busy: per group, the time of all else that each of `ranks` has to do meanwhile, in the same unit: of LLM stages
            that differ. None: the same for all.

    Returns: per group, the owner of each item, an element of `ranks`.
    """
    total = [0.0] * len(ranks)
    owners: list[list[int]] = []
    for number, times in enumerate(groups):
        if busy is not None:
            total = [before + other for before, other in zip(total, busy[number], strict=True)]
        share, least = sum(times) / len(ranks), min(total)
        load = [min(before - least, share) for before in total]
        chosen = [0] * len(times)
        for item in sorted(range(len(times)), key=lambda item: (-times[item], item)):
            place = load.index(min(load))
            chosen[item] = ranks[place]
            load[place] += times[item]
            total[place] += times[item]
        owners.append(chosen)
    return owners
