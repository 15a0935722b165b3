"""Items given to ranks: all of them, the same in every process, balanced over the batch, bounded in each group."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from bigmac_lightning.schedule.assign import assign

TIMES = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 40.0]), max_size=20), max_size=8)


def _loads(groups: list[list[float]], owners: list[list[int]], ranks: list[int]) -> list[list[float]]:
    """Per group, the time that each rank was given."""
    return [
        [sum(time for time, owner in zip(times, chosen, strict=True) if owner == rank) for rank in ranks]
        for times, chosen in zip(groups, owners, strict=True)
    ]


@given(TIMES, st.permutations(range(5)), st.integers(1, 5))
def test_no_rank_gets_more_of_a_group_than_two_shares_and_an_item(groups, ranks, size):
    ranks = ranks[:size]
    owners = assign(groups, ranks)
    assert [len(chosen) for chosen in owners] == [len(times) for times in groups]
    assert {owner for chosen in owners for owner in chosen} <= set(ranks)
    for times, row in zip(groups, _loads(groups, owners, ranks), strict=True):
        assert max(row) <= 2 * sum(times) / size + max(times, default=0.0) + 1e-9


def test_longest_first_and_ties_by_position():
    assert assign([[1, 4, 2, 2, 1]], [3, 5]) == [[3, 3, 5, 5, 5]]
    assert assign([[1, 1, 1, 1]], [2, 0, 1]) == [[2, 0, 1, 2]]
    assert assign([[], [1]], [0, 1]) == [[], [0]]


def test_what_was_uneven_is_carried_over():
    assert assign([[9, 1], [1, 1, 1, 1, 1, 1]], [0, 1]) == [[0, 1], [1, 1, 1, 0, 1, 0]]
    ranks, spread = list(range(8)), {"carried": 0.0, "anew": 0.0}
    for seed in range(5):
        chance = Random(seed)
        groups = [[chance.lognormvariate(0, 1) for _ in range(chance.randint(4, 40))] for _ in range(16)]
        anew = [owners for group in groups for owners in assign([group], ranks)]
        for name, owners in (("carried", assign(groups, ranks)), ("anew", anew)):
            total = [sum(row) for row in zip(*_loads(groups, owners, ranks), strict=True)]
            spread[name] += max(total) - min(total)
    assert spread["carried"] < 0.2 * spread["anew"]


def test_a_busy_rank_gets_less():
    even = [[1.0] * 12] * 4
    owners = assign(even, [0, 1, 2], busy=[[0, 0, 3]] * 4)
    assert [sum(row) for row in zip(*_loads(even, owners, [0, 1, 2]), strict=True)] == [20, 20, 8]
