"""Slices of microbatches: together they are the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigmac_lightning.contracts.batch import MediaItem, Microbatch, Origin, TargetItem
from bigmac_lightning.contracts.slices import (
    PER_TOKEN,
    WHOLE,
    WHOLE_IDS,
    WHOLE_POSITIONS,
    MicrobatchSlice,
    slice_bounds,
    slice_lengths,
    slice_of,
)


def some(generator: torch.Generator, total: int, share: float) -> Tensor:
    """Some flat positions, in any order."""
    order = torch.randperm(total, generator=generator)
    return order[: int(share * total)]


def microbatch(seed: int, rows: int = 2, tokens: int = 11, share: float = 0.4, position_rows: int = 1) -> Microbatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (rows, tokens), generator=generator)
    positions = torch.randint(0, 50, (position_rows, rows, tokens), generator=generator)
    total = rows * tokens
    labels, media, targets = (some(generator, total, share) for _ in range(3))
    return Microbatch(
        {
            "input_ids": ids,
            "position_ids": positions[0] if position_rows == 1 else positions,
            "token_mask": torch.ones_like(ids),
            "packed_sample_ids": ids[:, :0],
        },
        label_positions=labels,
        labels=torch.randint(0, 50, (len(labels),), generator=generator),
        media=[MediaItem("image", len(media))] if len(media) else [],
        media_positions=media,
        targets=[TargetItem("image", len(targets), (1,))] if len(targets) else [],
        target_positions=targets,
        origins=[Origin("a", 0, total)],
        llm_cost=3.0,
    )


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    number=st.integers(1, 5),
    more=st.integers(0, 9),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    position_rows=st.sampled_from([1, 4]),
)
def test_slices_are_the_whole(seed: int, rows: int, number: int, more: int, share: float, position_rows: int) -> None:
    whole = microbatch(seed, rows, number + more, share, position_rows)
    slices = [slice_of(whole, c, number) for c in range(number)]
    _, tokens = whole.shape
    for name in PER_TOKEN:
        assert torch.equal(torch.cat([one.inputs[name] for one in slices], -1), whole.inputs[name])
    hidden = torch.randn(rows, tokens, 2, generator=torch.Generator().manual_seed(seed))
    rows_of = {"label_rows": "label_positions", "feature_rows": "media_positions", "condition_rows": "target_positions"}
    for of_whole, positions in rows_of.items():
        expected = hidden.flatten(0, 1)[getattr(whole, positions)]
        found = torch.full_like(expected, float("nan"))
        for c, one in enumerate(slices):
            start, stop = slice_bounds(tokens, c, number)
            own = hidden[:, start:stop].flatten(0, 1)[getattr(one, positions)]
            assert found[getattr(one, of_whole)].isnan().all(), "a row belongs to one slice"
            found[getattr(one, of_whole)] = own
        assert torch.equal(found, expected)
    assert all(torch.equal(one.labels, whole.labels[one.label_rows]) for one in slices)
    for one in slices:
        assert one.is_useful == whole.is_useful
        assert one.has_labels == whole.has_labels
        assert (one.media, one.targets, one.origins, one.cost) == (whole.media, whole.targets, whole.origins, 3.0)
        assert one.inputs[WHOLE_POSITIONS] is whole.inputs["position_ids"]
        assert one.inputs[WHOLE_IDS] is whole.inputs["input_ids"]
        assert one.whole_media_positions is whole.media_positions
        assert all(one.inputs[name] is whole.inputs[name] for name in WHOLE if name in whole.inputs)
        assert one.inputs.keys() == whole.inputs.keys() | {WHOLE_POSITIONS, WHOLE_IDS}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), number=st.integers(1, 4), share=st.sampled_from([0.0, 0.1, 0.5]))
def test_condition_rows_of_slices_add_up(seed: int, number: int, share: float) -> None:
    whole = microbatch(seed, share=share)
    hidden = torch.randn(*whole.shape, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    expected = hidden.flatten(0, 1)[whole.target_positions]
    found = torch.zeros_like(expected)
    for c in range(number):
        one, (start, stop) = slice_of(whole, c, number), slice_bounds(whole.shape[1], c, number)
        found = found + one.in_whole(hidden[:, start:stop].flatten(0, 1)[one.target_positions])
    assert torch.equal(found, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    gradients = [torch.autograd.grad((rows * direction).sum(), hidden)[0] for rows in (found, expected)]
    assert torch.equal(*gradients)


def test_lengths_differ_by_one() -> None:
    assert slice_lengths(11, 3) == [4, 4, 3]
    assert slice_lengths(3, 3) == [1, 1, 1]
    assert [slice_bounds(11, c, 3) for c in range(3)] == [(0, 4), (4, 8), (8, 11)]
    with pytest.raises(ValueError, match="rows of 2 tokens, which cannot be divided over 3 ranks"):
        slice_lengths(2, 3)


def test_tensors_of_a_slice_move_with_it() -> None:
    one = slice_of(microbatch(1), 1, 2)
    moved = one.map(lambda tensor: tensor + 1)
    assert isinstance(moved, MicrobatchSlice)
    rows = ("feature_rows", "label_rows", "condition_rows")
    for name in (*rows, "label_positions", "target_positions", "whole_media_positions"):
        assert torch.equal(getattr(moved, name), getattr(one, name) + 1)
    assert (moved.whole_labels, moved.whole_conditions) == (one.whole_labels, one.whole_conditions)
    assert one.whole_labels > len(one.labels)


def test_what_cannot_be_cut() -> None:
    whole = microbatch(0)
    with pytest.raises(ValueError, match=r"the DataModule gives inputs \['ages'\]"):
        slice_of(Microbatch({**whole.inputs, "ages": torch.ones(2, 11)}), 0, 2)
    with pytest.raises(ValueError, match=r"inputs\['position_ids'\] has shape \(2, 3\), but input_ids \(2, 11\)"):
        slice_of(Microbatch({**whole.inputs, "position_ids": torch.ones(2, 3)}), 0, 2)
    with pytest.raises(ValueError, match="after LanguageModel"):
        slice_of(Microbatch({"input_ids": torch.ones(2, 3)}), 0, 2)
    with pytest.raises(ValueError, match="cannot be cut once more"):
        slice_of(slice_of(whole, 0, 2), 0, 2)
    with pytest.raises(ValueError, match="before these are cut into slices"):
        slice_of(whole, 0, 2).without([0])
