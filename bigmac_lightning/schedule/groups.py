"""The sizes of groups: how a batch's microbatches are divided into consecutive groups."""

from itertools import accumulate


def even_groups(microbatches: int, group_size: int) -> list[list[int]]:
    """Return consecutive groups of `group_size` microbatches; the last group may be smaller."""
    return [list(range(first, min(first + group_size, microbatches))) for first in range(0, microbatches, group_size)]


def ramp_groups(microbatches: int, group_size: int) -> list[list[int]]:
    """Return consecutive groups of 1, 1, 2, 4 .. `group_size` .. 4, 2, 1, 1 microbatches.

    While the first group's features are computed, and while the last group's encoder backward runs, the ranks have
    nothing else to do. The smaller these groups are, the shorter that time is.
    """
    ramp = [1]
    while sum(ramp) < group_size:
        ramp.append(sum(ramp))
    first: list[int] = []
    last: list[int] = []
    left = microbatches
    for size in ramp:
        for side in (first, last):
            side.append(min(size, left))
            left -= side[-1]
    sizes = [*first, *(len(group) for group in even_groups(left, group_size)), *last[::-1]]
    ends = list(accumulate(size for size in sizes if size))
    return [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
