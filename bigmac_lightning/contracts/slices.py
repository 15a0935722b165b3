"""How a microbatch's rows are cut into slices, one for each rank of context parallelism.

A slice is a microbatch of fewer tokens: rank c of n has the c-th part of every row. It has the labels, the feature rows
and the condition rows of its own tokens. Media and target items are not cut: a slice lists all of them, and says which
of their rows belong to its tokens. What attention has to know of the whole row stays whole.

Rows whose length n does not divide have slices that differ by one token. Padding would be the other way; but then every
computation that counts tokens would have to leave the padding out.

Shape suffixes: B samples, S tokens of the whole row, L labelled positions, N rows of features or conditions.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, Microbatch

WHOLE_POSITIONS = "whole_position_ids"
"""The input of a slice with the `position_ids` of the whole rows, of which it is a part."""
WHOLE_IDS = "whole_input_ids"
"""The input of a slice with the `input_ids` of the whole rows."""
PER_TOKEN = ("input_ids", "position_ids")
"""The inputs that are cut. Their last two dimensions are (B, S)."""
WHOLE = (
    "attention_mask",  # by these six, attention masks of whole rows are made
    "cu_seq_lens",
    "packed_sample_ids",
    "token_mask",
    "token_type_ids",
    "prompt_tokens",
    "image_grid_thw",  # of these three, positions have been made already
    "video_grid_thw",
    "second_per_grid_ts",
)
"""The inputs that every slice has whole."""


@dataclass
class MicrobatchSlice(Microbatch):
    """A part of each row of a microbatch.

    `inputs` and all positions are those of the slice's own tokens: flat indices into B * (tokens of the slice).
    `media`, `targets` and `origins` are those of the whole microbatch.

    Attributes:
        feature_rows: the indices into the whole microbatch's feature rows that belong to `media_positions`.
        label_rows: the indices into the whole microbatch's labels that belong to `labels`.
        condition_rows: the indices into the whole microbatch's condition rows that belong to `target_positions`.
        whole_media_positions: the `media_positions` of the whole microbatch.
        whole_labels: the number of labels of the whole microbatch.
        whole_conditions: the number of condition rows of the whole microbatch.
    """

    feature_rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    label_rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    condition_rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    whole_media_positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    whole_labels: int = 0
    whole_conditions: int = 0

    @property
    def has_labels(self) -> bool:
        """Whether the whole microbatch has labels: a slice without any takes part in the loss, with a sum of 0."""
        return self.whole_labels > 0

    def without_media(self) -> "MicrobatchSlice":
        names = ("media_positions", "whole_media_positions", "feature_rows")
        return replace(self, media=[], **{name: getattr(self, name)[:0] for name in names})

    def map(self, function: Callable[[Tensor], Tensor]) -> "MicrobatchSlice":
        mapped = super().map(function)
        assert isinstance(mapped, MicrobatchSlice)
        return replace(
            mapped,
            feature_rows=function(self.feature_rows),
            label_rows=function(self.label_rows),
            condition_rows=function(self.condition_rows),
            whole_media_positions=function(self.whole_media_positions),
        )

    def without(self, origins: Collection[int]) -> "MicrobatchSlice":
        raise ValueError("samples are left out of whole microbatches, before these are cut into slices")

    def in_whole(self, rows: Tensor) -> Tensor:
        """The condition rows (N, D) of the whole microbatch, of which those of other slices are zero.

        The sum over all slices is what the whole microbatch gives.

        Args:
            rows: the hidden states at `target_positions`.
        """
        whole = rows.new_zeros(self.whole_conditions, *rows.shape[1:])
        return whole.index_copy(0, self.condition_rows, rows)


def slice_lengths(tokens: int, number: int) -> list[int]:
    """How many tokens of a row each slice has; the first slices have one token more if `number` does not divide them.

    Raises:
        ValueError: there are fewer tokens than slices.
    """
    if tokens < number:
        raise ValueError(
            f"a microbatch has rows of {tokens} tokens, which cannot be divided over {number} ranks: give it longer "
            "rows (packing), or lower the size of context parallelism"
        )
    return [tokens // number + (c < tokens % number) for c in range(number)]


def slice_bounds(tokens: int, index: int, number: int) -> tuple[int, int]:
    """The first token of a slice in the whole row, and the token after its last one."""
    ends = list(accumulate(slice_lengths(tokens, number), initial=0))
    return ends[index], ends[index + 1]


def slice_of(microbatch: Microbatch, index: int, number: int) -> MicrobatchSlice:
    """A slice of a microbatch.

    Args:
        microbatch: a whole microbatch, whose inputs `LanguageModel.prepare` has completed.
        index: which of the slices, counted from 0.
        number: the number of slices.

    Raises:
        ValueError: the rows are too short, or it is not known how to cut one of the inputs.
    """
    if isinstance(microbatch, MicrobatchSlice):
        raise ValueError("a slice of a microbatch cannot be cut once more")
    _, tokens = microbatch.shape
    start, stop = slice_bounds(tokens, index, number)

    def within(positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these positions lie in the slice, and where."""
        columns = positions % tokens
        rows = ((columns >= start) & (columns < stop)).nonzero().flatten()
        return rows, positions[rows] // tokens * (stop - start) + columns[rows] - start

    feature_rows, media_positions = within(microbatch.media_positions)
    label_rows, label_positions = within(microbatch.label_positions)
    condition_rows, target_positions = within(microbatch.target_positions)
    whole: dict[str, Any] = {name: getattr(microbatch, name) for name in ("media", "targets", "origins", "llm_cost")}
    return MicrobatchSlice(
        inputs=_cut(microbatch.inputs, start, stop),
        label_positions=label_positions,
        labels=microbatch.labels[label_rows],
        media_positions=media_positions,
        target_positions=target_positions,
        feature_rows=feature_rows,
        label_rows=label_rows,
        condition_rows=condition_rows,
        whole_media_positions=microbatch.media_positions,
        whole_labels=len(microbatch.labels),
        whole_conditions=len(microbatch.target_positions),
        **whole,
    )


def with_slices(batch: Batch, index: int, number: int) -> Batch:
    """The batch with a slice of each microbatch, without the data of items, which the whole microbatch has.

    Call it while the batch is on the CPU: cutting reads positions, which on a device would wait for the device.

    Args:
        batch: a batch that `PipelineModule.prepare` has completed.
        index, number: see `slice_of`.
    """
    slices = list[Microbatch]()
    for microbatch in batch.microbatches:
        media = [replace(item, data=None) for item in microbatch.media]
        targets = [replace(item, data=None) for item in microbatch.targets]
        slices.append(slice_of(replace(microbatch, media=media, targets=targets), index, number))
    return batch.replace(slices=slices)


def _cut(inputs: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    if unknown := sorted(inputs.keys() - {*PER_TOKEN, *WHOLE}):
        raise ValueError(
            f"the DataModule gives inputs {unknown}, of which it is not known whether they are per token: context "
            f"parallelism cuts {list(PER_TOKEN)} along their last dimension, and leaves {list(WHOLE)} whole"
        )
    if "position_ids" not in inputs:
        raise ValueError("a microbatch is cut into slices after LanguageModel.prepare, which gives it position_ids")
    shape = inputs["input_ids"].shape
    cut = {name: inputs[name] for name in WHOLE if name in inputs}
    for name in PER_TOKEN:
        if inputs[name].shape[-2:] != shape:
            raise ValueError(
                f"inputs[{name!r}] has shape {tuple(inputs[name].shape)}, but input_ids {tuple(shape)}: its last two "
                "dimensions must be the same"
            )
        cut[name] = inputs[name][..., start:stop]
    cut[WHOLE_POSITIONS], cut[WHOLE_IDS] = inputs["position_ids"], inputs["input_ids"]
    return cut
