from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.datamodules import Collator, Media, Sample, Target
from bigmac_lightning.datamodules.loading.collate import make_batch, split_evenly
from bigmac_lightning.datamodules.loading.flat_batch import FlatBatch


class Loads:
    """Counts what is loaded; an item's data says which item it is."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def of(self, item: int) -> Tensor:
        self.counts[item] += 1
        return torch.tensor([float(item)])


def samples(loads: Loads) -> list[Sample]:
    """Unequal lengths, costs and numbers of items: sample i has i % 3 media items and i % 2 targets."""
    made: list[Sample] = []
    for i in range(11):
        media = [
            Media("image", 1 + 2 * k, 2, lambda n=10 * i + k: loads.of(n), cost=1 + 7 * (i == 4)) for k in range(i % 3)
        ]
        start = 1 + 2 * len(media)
        targets = [Target("image", start, 2, (1,), i, lambda n=1000 + i: loads.of(n), cost=1 + i) for _ in range(i % 2)]
        length = start + 2 * len(targets) + i % 4
        made.append(
            Sample(range(100 * i, 100 * i + length), [s > 0 and s % 2 == 0 for s in range(length)], media, targets)
        )
    return made


def collate(layout: PipelineLayout, microbatches: int, loads: Loads | None = None) -> Batch:
    return Collator(layout, microbatches, padding=7)(samples(loads or Loads()))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_every_item_is_loaded_once_by_its_owner(size: int, group_size: int) -> None:
    loads = Loads()
    batches = [collate(PipelineLayout(size, rank, group_size), 4, loads) for rank in range(size)]
    expected = {10 * i + k for i in range(11) for k in range(i % 3)} | {1000 + i for i in range(11) if i % 2}
    assert loads.counts == dict.fromkeys(expected, 1)
    for rank, batch in enumerate(batches):
        for microbatch in batch.microbatches:
            for item in (*microbatch.media, *microbatch.targets):
                assert (item.data is not None) == (item.owner == rank)
    if group_size == 4:  # one group of everything: no rank goes without
        assert {item.owner for item in batches[0].targets} == set(range(size))


def drawn(loads: Loads) -> list[Sample]:
    """Samples with a picture that is read, and one that the LLM draws: a media item and a target at the same tokens."""
    made = list[Sample]()
    for i in range(9):
        load = partial(loads.of, i)
        read = Media("image", 1, 1 + i % 2, lambda n=100 + i: loads.of(n), cost=1.0 + i % 3)
        comes_in = Media("drawn", 4, 3, load, cost=1.0 + i % 4)
        made.append(Sample(range(9), [False] * 9, [read, comes_in], [Target("image", 4, 3, (1,), i, load)]))
    return made


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("peers", [1, 2])
def test_a_picture_that_is_drawn_is_loaded_once(size: int, peers: int) -> None:
    """Also on its way from a worker to a device; and no rank goes without."""
    loads = Loads()
    layouts = [PipelineLayout(size, rank, 2, peers=peers, peer=peer) for rank in range(size) for peer in range(peers)]
    batches = [Collator(layout, 3)(drawn(loads)) for layout in layouts]
    assert loads.counts == dict.fromkeys([*range(9), *range(100, 109)], 1)
    assert {item.owner for item in batches[0].targets} == set(range(size))
    for batch in batches:
        restored = FlatBatch.flatten(batch).restore()
        there = restored._map(lambda tensor: tensor + 0)
        media = [item.data for m in there.microbatches for item in m.media if item.encoder == "drawn"]
        assert all(item.data is data for item, data in zip(there.targets, media, strict=True))


def test_ranks_that_only_encode_or_generate_load_what_they_need() -> None:
    loads = Loads()
    for rank in range(3):
        Collator(PipelineLayout(3, rank, 2, encoder_ranks=(0,), generator_ranks=(2,)), 3)(drawn(loads))
    assert [loads.counts[i] for i in range(9)] == [2] * 9


def test_all_ranks_describe_the_same_batch() -> None:
    batches = [collate(PipelineLayout(3, rank, 2), 4) for rank in range(3)]
    for batch in batches[1:]:
        for one, other in zip(batches[0].microbatches, batch.microbatches, strict=True):
            assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
            assert torch.equal(one.labels, other.labels)
            assert [replace(item, data=None) for item in one.media] == [
                replace(item, data=None) for item in other.media
            ]
            assert [replace(t, data=None) for t in one.targets] == [replace(t, data=None) for t in other.targets]


def test_only_some_ranks_may_own() -> None:
    loads = Loads()
    layout = PipelineLayout(3, 2, 2, encoder_ranks=(1,), generator_ranks=(0, 2))
    batch = collate(layout, 4, loads)
    assert {item.owner for m in batch.microbatches for item in m.media} == {1}
    assert {item.owner for item in batch.targets} == {0, 2}
    assert all(item >= 1000 for item in loads.counts)


def test_tokens_positions_and_labels() -> None:
    given = samples(Loads())
    batch = collate(PipelineLayout(), 4)
    assert [m.shape for m in batch.microbatches] == [(2, 6), (3, 7), (3, 8), (3, 5)]
    assert batch.samples == len(given)
    row = iter(given)
    for microbatch in batch.microbatches:
        ids, S = microbatch.inputs["input_ids"], microbatch.shape[1]
        flat = ids.flatten()
        assert torch.equal(microbatch.inputs["position_ids"], torch.arange(S).expand(ids.shape))
        predicted: list[tuple[int, int]] = []
        media: list[float] = []
        targets: list[float] = []
        for b in range(len(ids)):
            sample = next(row)
            tokens, n = list(sample.tokens), len(sample.tokens)
            assert ids[b].tolist() == tokens + [7] * (S - n)
            predicted += [(tokens[s - 1], tokens[s]) for s in range(n) if sample.labelled[s]]
            media += [tokens[s] for item in sample.media for s in range(item.start, item.start + item.rows)]
            targets += [tokens[s] for item in sample.targets for s in range(item.start, item.start + item.rows)]
        assert flat[microbatch.label_positions].tolist() == [before for before, _ in predicted]
        assert microbatch.labels.tolist() == [after for _, after in predicted]
        assert flat[microbatch.media_positions].tolist() == media
        assert flat[microbatch.target_positions].tolist() == targets
        assert sum(item.rows for item in microbatch.media) == len(media)
        for item in microbatch.targets:
            assert item.data is not None
            assert item.data.item() == 1000 + item.seed


def test_targets_to_be_sampled_have_no_data() -> None:
    sample = Sample([1, 2], [False, False], targets=[Target("image", 1, 1, (1,), 0)])
    (item,) = Collator(PipelineLayout(), 3)([sample]).targets
    assert item.data is None


@pytest.mark.parametrize(("samples", "parts"), [(11, 4), (12, 4), (3, 8), (1, 1), (9, 8)])
def test_split_is_even_and_in_order(samples: int, parts: int) -> None:
    split = split_evenly([Sample([i], [False]) for i in range(samples)], parts)
    assert len(split) == min(samples, parts)
    assert [sample.tokens[0] for part in split for sample in part] == list(range(samples))
    lengths = {len(part) for part in split}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [False]), "has 2 tokens, but labelled has 1"),
        (([1, 2], [True, False]), "first token cannot be labelled"),
        (([1, 2], [False, True], [Media("image", 1, 2, lambda: torch.zeros(1))]), r"rows 1\.\.2 .* 2 tokens"),
        (([1, 2], [False, True], (), [Target("image", -1, 2, (1,), 0)]), r"rows -1\.\.0 .* 2 tokens"),
    ],
)
def test_samples_that_make_no_sense(arguments: tuple[list[int], list[bool]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sample(*arguments)


def test_attention_counts_in_the_cost_of_a_microbatch() -> None:
    """Packed samples attend to themselves only; padded ones cost as the longest."""
    samples = [Sample([1] * n, [False] * n) for n in (10, 30)]
    layout = PipelineLayout()
    assert make_batch([samples], layout).microbatches[0].cost == 60
    packed = make_batch([samples], layout, packed=True, attention_tokens=100).microbatches[0]
    assert packed.cost == 40 + 1 + 9
    assert packed.map(lambda tensor: tensor).cost == packed.cost
    assert make_batch([samples], layout, attention_tokens=100).microbatches[0].cost == 2 * (30 + 9)
