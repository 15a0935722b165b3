import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmac_lightning.datamodules.packing import packing
from bigmac_lightning.datamodules.packing.packing import apportion, deal, pack


def mix(*arguments, **options) -> list[tuple[int, int]]:
    sources, indices = packing.mix(*arguments, **options)
    return list(zip(sources.tolist(), indices.tolist(), strict=True))


def lognormal(number: int, budget: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [min(budget, max(8, int(draw.lognormvariate(5.5, 1.0)))) for _ in range(number)]


def quadratic(tokens: list[int]) -> list[float]:
    return [n + n * n / 4000 for n in tokens]


@given(
    st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90), st.integers(1, 70), st.booleans()
)  # fmt: skip
@settings(deadline=None)
def test_every_sample_once_and_no_bin_over_the_budget(
    tokens: list[int], budget: int, buffer_size: int, ordered: bool
) -> None:
    bins = pack(tokens, quadratic(tokens), budget, buffer_size, ordered)
    assert sorted(i for b in bins for i in b) == list(range(len(tokens)))
    assert all(0 < sum(tokens[i] for i in b) <= budget for b in bins)
    if ordered:
        assert [i for b in bins for i in b] == list(range(len(tokens)))


def test_bins_are_full_and_even() -> None:
    budget = 8192
    tokens = lognormal(4000, 2048)
    costs = quadratic(tokens)
    bins = pack(tokens, costs, budget, 512)
    assert sum(tokens) / (budget * len(bins)) > 0.97
    ordered = pack(tokens, costs, budget, 512, ordered=True)
    assert len(bins) < len(ordered)

    def unevenness(bins: list[list[int]]) -> float:
        sums = [sum(costs[i] for i in b) for b in bins]
        return max(sums) * len(sums) / sum(sums)

    assert unevenness(bins) < 1.05 < 1.15 < unevenness(ordered)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 3), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 6)), st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_replicas_get_equally_many(
    tokens: list[int], replicas: int, microbatches: int, steps: int | None, exact: bool
) -> None:
    costs = quadratic(tokens)
    bins = pack(tokens, costs, 60, 20)
    dealt = deal(bins, costs, replicas, microbatches, steps, exact)
    assert steps is None or len(dealt) == steps
    counts = Counter(i for step in dealt for replica in step for b in replica for i in b)
    for step in dealt:
        assert len(step) == replicas
        assert len({len(part) for part in step}) == 1
        assert len(step[0]) >= 1
        assert not exact or len(step[0]) == microbatches
    slots = sum(len(part) for step in dealt for part in step)
    if slots <= len(tokens) and not (exact and steps is not None and len(bins) > slots):
        assert counts == dict.fromkeys(range(len(tokens)), 1)  # cutting bins suffices
    elif len(bins) <= slots:
        assert set(counts) == set(range(len(tokens)))


def test_replicas_are_balanced() -> None:
    tokens = lognormal(2000, 4096)
    costs = quadratic(tokens)
    bins = pack(tokens, costs, 4096, 256)
    random.Random(1).shuffle(bins)
    for step in deal(bins, costs, 4, 8):
        loads = [sum(costs[i] for b in part for i in b) for part in step]
        assert max(loads) < 1.02 * sum(loads) / len(loads)


@pytest.mark.parametrize("replicas", [2, 4, 16])
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_replicas_are_balanced_in_each_kind_of_cost(replicas: int, sigma: float) -> None:
    """Texts, images of very different sizes, and drawings, of which some steps have few."""
    draw = random.Random(0)
    tokens = lognormal(6000, 4096)
    media = [draw.lognormvariate(5.0, sigma) if draw.random() < 0.7 else 0.0 for _ in tokens]
    targets = [float(draw.random() < 0.3) for _ in tokens]
    costs = quadratic(tokens)
    bins = pack(tokens, costs, 4096, 256)
    random.Random(1).shuffle(bins)
    dealt = deal(bins, costs, replicas, 8, exact=True, further=[media, targets])
    unbalanced = deal(bins, costs, replicas, 8, exact=True)
    most, before = [], []
    for found, into in ((dealt, most), (unbalanced, before)):
        for step in found:
            for kind in (costs, media, targets):
                loads = [sum(kind[i] for b in part for i in b) for part in step]
                into.append(max(loads) * len(loads) / sum(loads))
        assert sorted(i for step in found for part in step for b in part for i in b) == list(range(len(tokens)))
    whole = [sum(kind[i] / sum(kind) for kind in (costs, media, targets)) for i in range(len(tokens))]
    for step in dealt:  # of work of which each kind is a third
        loads = [sum(whole[i] for b in part for i in b) for part in step]
        assert max(loads) * len(loads) / sum(loads) < (1.03 if replicas <= 4 else 1.05)
    most.sort()
    before.sort()
    assert most[len(most) // 2] < 1.025
    assert most[-1] < 1.05 < 1.2 < before[int(0.9 * len(before))]


def test_mixture() -> None:
    assert apportion(10, [1, 1, 2]) == [3, 2, 5]
    order = mix([100, 10], [3, 1], 80, seed=0, epoch=0, shuffle=True)
    assert Counter(source for source, _ in order) == {0: 60, 1: 20}
    assert Counter(order)[1, 3] == 2  # the small source is gone through twice
    whole = [mix([100, 10], [3, 1], 80, seed=0, epoch=e, shuffle=True) for e in range(5)]
    seen = Counter(pick for epoch in whole for pick in epoch)
    assert {seen[0, i] for i in range(100)} == {3}  # 300 draws of 100
    assert whole[0] == order != whole[1]
    assert mix([100, 10], [3, 1], 80, seed=1, epoch=0, shuffle=True) != order


def test_mixture_in_order_is_interleaved_evenly() -> None:
    order = mix([4, 2], None, None, seed=0, epoch=3, shuffle=False)
    assert [index for source, index in order if source == 0] == [0, 1, 2, 3]
    assert [source for source, _ in order] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_of_everything_has_everything_once(epoch: int) -> None:
    order = mix([7, 5], None, None, seed=2, epoch=epoch, shuffle=True)
    assert sorted(order) == [(s, i) for s, size in enumerate([7, 5]) for i in range(size)]
