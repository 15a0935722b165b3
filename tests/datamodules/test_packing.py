import itertools
import math
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmac_lightning.datamodules import PackingOptions
from bigmac_lightning.datamodules.example import Size
from bigmac_lightning.datamodules.packing import measuring, steps
from bigmac_lightning.datamodules.packing.epoch import (
    EpochSteps,
    Samples,
    StepSize,
    bounds_of_buffers,
    numbers_of_bins,
)
from bigmac_lightning.datamodules.packing.measuring import Measured, Measurements
from bigmac_lightning.datamodules.packing.order import Order, apportion
from bigmac_lightning.datamodules.packing.packing import deal, number_of_bins, pack
from bigmac_lightning.datamodules.packing.steps import StepSampler
from bigmac_lightning.datamodules.permutation import key_of, keys_of, permuted

Picks = list[tuple[int, int]]


def order_of(*arguments: Any, **options: Any) -> Picks:
    order = Order(*arguments, **options)
    return pairs(*order.part(0, len(order)))


def pairs(sources: np.ndarray, examples: np.ndarray) -> Picks:
    return list(zip(sources.tolist(), examples.tolist(), strict=True))


def lognormal(number: int, budget: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [min(budget, max(8, int(draw.lognormvariate(5.5, 1.0)))) for _ in range(number)]


def packed(tokens: list[int], costs: list[float], budget: int, buffer_size: int) -> list[list[int]]:
    """The bins of one buffer after another."""
    bins: list[list[int]] = []
    for start in range(0, len(tokens), buffer_size):
        buffer = slice(start, start + buffer_size)
        bins += [[start + i for i in b] for b in pack(tokens[buffer], costs[buffer], budget)]
    return bins


def quadratic(tokens: list[int]) -> list[float]:
    return [n + n * n / 4000 for n in tokens]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90), st.booleans())
@settings(deadline=None)
def test_every_sample_once_and_no_bin_over_the_budget(tokens: list[int], budget: int, ordered: bool) -> None:
    bins = pack(tokens, quadratic(tokens), budget, ordered)
    assert len(bins) == number_of_bins(np.array(tokens, np.int64), budget, ordered)
    assert sorted(i for b in bins for i in b) == list(range(len(tokens)))
    assert all(0 < sum(tokens[i] for i in b) <= budget for b in bins)
    if ordered:
        assert [i for b in bins for i in b] == list(range(len(tokens)))


def test_bins_are_full_and_even() -> None:
    budget = 8192
    tokens = lognormal(512, 2048)
    costs = quadratic(tokens)
    bins = pack(tokens, costs, budget)
    assert sum(tokens) / (budget * len(bins)) > 0.97
    ordered = pack(tokens, costs, budget, ordered=True)
    assert len(bins) < len(ordered)

    def unevenness(bins: list[list[int]]) -> float:
        sums = [sum(costs[i] for i in b) for b in bins]
        return max(sums) * len(sums) / sum(sums)

    assert unevenness(bins) < 1.05 < 1.1 < unevenness(ordered)


def measured(tokens: list[int], draw: random.Random) -> Measurements:
    """Of examples of so many tokens; 0: it cannot be used."""
    return Measurements.of(
        [Measured(n, 1, 0, draw.random(), draw.random()) if n else Measured(error="is broken") for n in tokens]
    )


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=40), min_size=1, max_size=3),
    st.integers(1, 3), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 6)), st.booleans(), st.integers(1, 50),
    st.booleans(), st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_replicas_get_equally_many(
    tokens: list[list[int]],
    replicas: int,
    microbatches: int,
    number: int | None,
    exact: bool,
    buffer_size: int,
    ordered: bool,
    shuffle: bool,
) -> None:
    """Any step, asked for alone, of all sources: each sample once, unless there are too few or too many."""
    sources = [measured([*own, 3], random.Random(0)) for own in tokens]
    packing, size = PackingOptions(buffer_size=buffer_size, ordered=ordered), StepSize(60, microbatches, exact)
    samples = Samples(sources, Order([m.number_usable for m in sources], None, None, 0, 1, shuffle))
    numbers = numbers_of_bins(samples, 60, packing)

    def made() -> EpochSteps:
        return EpochSteps(samples, numbers, size, packing, replicas, number, "0" if shuffle else None)

    dealt = [made()[step] for step in range(len(made()))]
    whole = made()
    assert dealt == [whole[step] for step in range(len(whole))]
    assert number is None or len(dealt) == number
    for step in dealt:
        assert len(step) == replicas
        assert len({len(part) for part in step}) == 1
        assert len(step[0]) >= 1
        assert not exact or len(step[0]) == microbatches
        for b in (b for part in step for b in part):
            assert 0 < sum(int(sources[source].tokens[i]) for source, i in b) <= 60
    dealt_picks = [pick for step in dealt for replica in step for b in replica for pick in b]
    if ordered and not shuffle and replicas == 1:
        in_order = pairs(*samples.part(0, len(samples)))
        assert dealt_picks[: len(in_order)] == in_order[: len(dealt_picks)]
    counts = Counter(dealt_picks)
    usable = [(s, i) for s, m in enumerate(sources) for i, n in enumerate(m.tokens) if n]
    slots = sum(len(part) for step in dealt for part in step)
    if slots <= len(usable) and not (exact and number is not None and numbers.sum() > slots):
        assert counts == dict.fromkeys(usable, 1)  # cutting bins suffices
    elif numbers.sum() <= slots:
        assert set(counts) == set(usable)


def test_buffers_are_of_nearly_equal_size() -> None:
    """Otherwise the few samples of the last one would not fill its bins."""
    for samples, size in ((1, 10), (10, 10), (11, 10), (1001, 100), (7, 1)):
        sizes = np.diff(bounds_of_buffers(samples, size)).tolist()
        assert sum(sizes) == samples
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7])
def test_random_orders_are_random(size: int) -> None:
    """Each of all orders of a few numbers comes about equally often."""
    trials = 100 * math.factorial(size)
    keys = np.repeat(keys_of(key_of("seed"), np.arange(trials)), size)
    made = permuted(np.tile(np.arange(size), trials), np.full(size * trials, size), keys).reshape(trials, size)
    found = Counter(map(tuple, made.tolist()))
    assert set(found) == set(itertools.permutations(range(size)))
    assert max(found.values()) < 150
    assert min(found.values()) > 55


@given(st.integers(1, 100_000), st.text())
@settings(deadline=None, max_examples=50)
def test_random_orders_have_everything_once(size: int, seed: str) -> None:
    made = permuted(np.arange(size), np.full(size, size), np.full(size, key_of(seed)))
    assert np.array_equal(np.sort(made), np.arange(size))
    if size > 1000:
        assert abs(np.corrcoef(made, np.arange(size))[0, 1]) < 5 / size**0.5
        assert (made == np.arange(size)).sum() < 12


def test_random_orders_never_change() -> None:
    """Or runs would not continue where they stopped."""
    made = permuted(np.arange(10), np.full(10, 10), np.full(10, key_of("seed")))
    assert made.tolist() == [6, 9, 3, 2, 1, 5, 7, 8, 0, 4]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5), st.booleans(), st.integers(0, 4), st.data(),
)  # fmt: skip
@settings(deadline=None)
def test_parts_of_an_order(sizes: list[int], shuffle: bool, epoch: int, data: st.DataObject) -> None:
    drawn = st.none() | st.lists(st.sampled_from([0.1, 0.5, 1, 3.3]), min_size=len(sizes), max_size=len(sizes))
    weights, samples = data.draw(drawn), data.draw(st.none() | st.integers(1, 200))
    order = Order(sizes, weights, samples, 1, epoch, shuffle)
    whole, cuts = order_of(sizes, weights, samples, 1, epoch, shuffle), data.draw(st.lists(st.integers(0, len(order))))
    cuts = [0, *sorted(cuts), len(order)]
    assert whole == [pick for a, b in itertools.pairwise(cuts) for pick in pairs(*order.part(a, b))]
    counts = apportion(len(order), sizes if weights is None else weights)
    assert [sum(source == s for source, _ in whole) for s in range(len(sizes))] == counts
    if not shuffle:  # sample j of c comes at (2 j + 1) / 2 c of the epoch
        times = sorted((Fraction(2 * j + 1, 2 * c), s, j % sizes[s]) for s, c in enumerate(counts) for j in range(c))
        assert whole == [(s, j) for _, s, j in times]


def test_replicas_are_balanced() -> None:
    tokens = lognormal(2000, 4096)
    costs = quadratic(tokens)
    bins = packed(tokens, costs, 4096, 256)
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
    bins = packed(tokens, costs, 4096, 256)
    random.Random(1).shuffle(bins)
    dealt = deal(bins, costs, replicas, 8, [media, targets])
    unbalanced = deal(bins, costs, replicas, 8)
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
    order = order_of([100, 10], [3, 1], 80, seed=0, epoch=0, shuffle=True)
    assert Counter(source for source, _ in order) == {0: 60, 1: 20}
    assert Counter(order)[1, 3] == 2  # the small source is gone through twice
    whole = [order_of([100, 10], [3, 1], 80, seed=0, epoch=e, shuffle=True) for e in range(5)]
    seen = Counter(pick for epoch in whole for pick in epoch)
    assert {seen[0, i] for i in range(100)} == {3}  # 300 draws of 100
    assert whole[0] == order != whole[1]
    assert order_of([100, 10], [3, 1], 80, seed=1, epoch=0, shuffle=True) != order


def test_mixture_in_order_is_interleaved_evenly() -> None:
    order = order_of([4, 2], None, None, seed=0, epoch=3, shuffle=False)
    assert [index for source, index in order if source == 0] == [0, 1, 2, 3]
    assert [source for source, _ in order] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_of_everything_has_everything_once(epoch: int) -> None:
    order = order_of([7, 5], None, None, seed=2, epoch=epoch, shuffle=True)
    assert sorted(order) == [(s, i) for s, size in enumerate([7, 5]) for i in range(size)]


def test_numbers_of_bins_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many samples: another process, or a run that continues, finds them."""
    monkeypatch.setattr(steps, "MANY", 100)
    counted: list[int] = []

    def noted(samples: Samples, *arguments: Any) -> np.ndarray:
        counted.append(len(samples))
        return numbers_of_bins(samples, *arguments)

    monkeypatch.setattr(steps, "numbers_of_bins", noted)
    tokens = lognormal(300, 60)

    def epochs(many: list[int], seed: int = 0) -> list[Any]:
        size, packing = StepSize(60, 2, True), PackingOptions(buffer_size=20)
        sources = [measured(many, random.Random(0))]
        sampler = StepSampler(sources, size, packing, shuffle=True, seed=seed, kept_in=tmp_path)
        found = []
        for epoch in (0, 2):
            sampler.set_epoch(epoch)
            found.append([step.bins for step in sampler])
        return found

    first = epochs(tokens)
    assert (counted, epochs(tokens)) == ([300, 300], first)
    assert counted == [300, 300]
    epochs(tokens, seed=1)
    epochs([*tokens[:-1], tokens[-1] % 59 + 1])
    assert len(counted) == 6, "of another order and of other data, they are others"
    few = len([*tmp_path.iterdir()])
    epochs(tokens[:99])
    assert (len(counted), len([*tmp_path.iterdir()])) == (8, few), "those of few samples are not kept"


def test_many_measurements_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    many = [
        Measured(error="ä" * draw.randint(1, 9))
        if draw.random() < 0.3
        else Measured(draw.randint(1, 9), 1, 0, draw.random(), 0.0, (Size(draw.randint(1, 9), 2),) * draw.randint(0, 3))
        for _ in range(50)
    ]
    expected = Measurements.of(many)
    for joined in (1, 7, 1000):
        monkeypatch.setattr(measuring, "JOINED", joined)
        found = Measurements.joined(many[a : a + 4] for a in range(0, 50, 4))
        assert found.errors == expected.errors
        for name, array in expected.arrays.items():
            assert np.array_equal(found.arrays[name], array), name
        assert [found.sizes(i) for i in range(50)] == [expected.sizes(i) for i in range(50)]
    usable = [i for i, one in enumerate(many) if not one.error]
    assert expected.usable(np.arange(expected.number_usable)).tolist() == usable
