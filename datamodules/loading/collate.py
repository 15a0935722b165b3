"""Makes a `Batch` of samples: microbatches, padding, positions and owners; then the pixels of the items that are owned.

A `Sample` is a small record that every rank can afford to make: token ids, and for each media item and generator target
its index, size, cost and a function that loads it. Only the item's owner calls that function.

Shape suffixes: B samples of a microbatch, S tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import (
    Batch,
    MediaData,
    MediaItem,
    Microbatch,
    Origin,
    PipelineLayout,
    TargetItem,
)
from bigmac_lightning.contracts.owners import assign_owners

from ..packing.packing import llm_cost


@dataclass(frozen=True)
class Media:
    """An image, a video or another media item of a sample.

    Attributes:
        encoder: name of the encoder that turns it into features.
        start: index of its first placeholder token in the sample.
        rows: number of placeholder tokens, which as many feature rows replace.
        load: makes the input of the encoder; ``None`` if the model does, as of a picture that it is drawing.
        cost: encoder forward time in any unit shared by all items.
        name: what errors call it.
        grid: (t, h, w) numbers of its patches, for models whose positions depend on them.
        scattered: indices of its placeholder tokens, if they are not contiguous.
        seconds: duration of a time step of its grid, for models whose positions depend on it.
        one_token: whether all of its rows belong to one token, which they do not replace: layers of the LLM attend to
            them.
    """

    encoder: str
    start: int
    rows: int
    load: Callable[[], MediaData] | None
    cost: float = 1.0
    name: str = ""
    grid: tuple[int, int, int] | None = None
    scattered: Sequence[int] = ()
    seconds: float | None = None
    one_token: bool = False

    @property
    def tokens(self) -> int:
        """The number of its tokens."""
        return 1 if self.one_token else self.rows

    @property
    def indices(self) -> Sequence[int]:
        """The index in the sample of the token of each of its rows."""
        return (
            [self.start] * self.rows if self.one_token else self.scattered or range(self.start, self.start + self.rows)
        )


@dataclass(frozen=True)
class Target:
    """A tensor that a generator learns to make, or is to make, from a sample.

    Attributes:
        generator: name of the generator.
        start: index in the sample of the first token whose final hidden state conditions it.
        rows: number of these tokens.
        shape: shape of the tensor.
        seed: seed of the noise from which it is made.
        load: makes the tensor of that shape to learn from; ``None`` in sampling, where there is none.
        cost: generator time in any unit shared by all items.
        name: what errors call it.
    """

    generator: str
    start: int
    rows: int
    shape: tuple[int, ...]
    seed: int
    load: Callable[[], Tensor] | None = None
    cost: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Sample:
    """One training example before anything is decoded.

    Attributes:
        tokens: token ids, placeholders included.
        labelled: for each token whether the model learns to predict it from those before it.
        media: media items, in the order of their placeholders. A picture that the LLM itself draws is one of them and a
            target, with the same tokens; it is loaded once if both have the same function `load`.
        targets: generator targets, in the order of their tokens.
        name: what errors call it.
    """

    tokens: Sequence[int]
    labelled: Sequence[bool]
    media: Sequence[Media] = ()
    targets: Sequence[Target] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if len(self.labelled) != len(self.tokens):
            raise ValueError(f"a sample has {len(self.tokens)} tokens, but labelled has {len(self.labelled)} entries")
        if self.labelled and self.labelled[0]:
            raise ValueError("a sample's first token cannot be labelled: nothing precedes it; start with another token")
        for item in (*self.media, *self.targets):
            tokens = item.tokens if isinstance(item, Media) else item.rows
            if item.start < 0 or item.start + tokens > len(self.tokens):
                raise ValueError(
                    f"rows {item.start}..{item.start + item.rows - 1} of an item lie outside its sample's "
                    f"{len(self.tokens)} tokens: one placeholder token per row is needed"
                )

    def to_draw(self) -> "Sample":
        """The sample for sampling, where pictures that are to be made are not loaded."""
        drawn = {target.start for target in self.targets}
        return replace(
            self,
            media=[replace(item, load=None) if item.start in drawn else item for item in self.media],
            targets=[replace(target, load=None) for target in self.targets],
        )


@dataclass(frozen=True)
class Collator:
    """The collate function of a DataLoader.

    It splits the samples, in their order, into microbatches of nearly equal numbers of samples. Fewer samples than
    microbatches give fewer microbatches.

    Attributes:
        layout: this process's place in its pipeline.
        microbatches: number of microbatches.
        padding: token id of the padding.
    """

    layout: PipelineLayout
    microbatches: int
    padding: int = 0

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return make_batch(split_evenly(samples, self.microbatches), self.layout, self.padding)


def make_batch(
    parts: Sequence[Sequence[Sample]],
    layout: PipelineLayout,
    padding: int = 0,
    packed: bool = False,
    failed: Callable[[Exception], str] | None = None,
    attention_tokens: float | None = None,
) -> Batch:
    """A batch, with the data of the items that this process owns.

    Args:
        parts: the samples of each microbatch.
        layout: this process's place in its pipeline.
        padding: token id of the padding.
        packed: the samples of a microbatch are concatenated into one row; their positions restart, by which attention
            keeps them apart. Otherwise each sample has a row, padded on the right to the longest; causal attention
            needs no mask for that.
        failed: turns an exception that loading an item raised into a text, which becomes the item's `error`; ``None``:
            the exception is raised.
        attention_tokens: length of a sample at which attention costs as much as the rest of a layer; ``None``: the cost
            of a microbatch is its number of tokens.
    """
    microbatches = [_describe(part, padding, packed) for part in parts]
    for part, microbatch in zip(parts, microbatches, strict=True):
        if attention_tokens is not None:
            rows, longest = microbatch.shape
            lengths = [len(sample.tokens) for sample in part] if packed else [longest] * rows
            microbatch.llm_cost = sum(llm_cost(length, attention_tokens) for length in lengths)
    assign_owners(microbatches, layout)
    for part, microbatch in zip(parts, microbatches, strict=True):
        loads: list[Callable[[], Any] | None] = [item.load for sample in part for item in sample.media]
        loads += [item.load for sample in part for item in sample.targets]
        loaded: dict[int, tuple[Any, str | None]] = {}
        for item, load in zip([*microbatch.media, *microbatch.targets], loads, strict=True):
            if load is None or not layout.owns(item):
                continue
            if id(load) not in loaded:  # a picture that is drawn is a media item and a target
                loaded[id(load)] = _loaded(load, failed)
            item.data, item.error = loaded[id(load)]
    return Batch(microbatches, layout)


def _loaded(load: Callable[[], Any], failed: Callable[[Exception], str] | None) -> tuple[Any, str | None]:
    """What is loaded, or why it cannot be."""
    try:
        return load(), None
    except Exception as error:
        if failed is None:
            raise
        return None, failed(error)


def _describe(samples: Sequence[Sample], padding: int, packed: bool) -> Microbatch:
    """A microbatch without the data of its items.

    Returns: inputs "input_ids" and "position_ids" (B, S), labels, and the positions of labels, media rows and target
    rows in the flattened B x S tokens.
    """
    lengths = [len(sample.tokens) for sample in samples]
    if packed:
        starts = [0, *accumulate(lengths)][:-1]
        ids_BS = torch.tensor([token for sample in samples for token in sample.tokens])[None]
        positions_BS = torch.cat([torch.arange(length) for length in lengths])[None]
    else:
        S = max(lengths)
        starts = [b * S for b in range(len(samples))]
        ids_BS = torch.full((len(samples), S), padding)
        for b, sample in enumerate(samples):
            ids_BS[b, : lengths[b]] = torch.tensor(sample.tokens)
        positions_BS = torch.arange(S).repeat(len(samples), 1)
    microbatch = Microbatch({"input_ids": ids_BS, "position_ids": positions_BS})
    if not packed and min(lengths) < max(lengths):  # for models that count tokens; causal attention needs no mask
        microbatch.inputs["token_mask"] = (positions_BS < torch.tensor(lengths)[:, None]).long()
    labelled: list[int] = []
    media_rows: list[int] = []
    target_rows: list[int] = []
    grids: dict[str, list[Any]] = {}
    for i, (first, sample) in enumerate(zip(starts, samples, strict=True)):
        microbatch.origins.append(Origin(sample.name, first, first + len(sample.tokens)))
        labelled += [first + s for s, wanted in enumerate(sample.labelled) if wanted]
        for media in sample.media:
            media_rows += [first + index for index in media.indices]
            microbatch.media.append(MediaItem(media.encoder, media.rows, media.cost, origin=i))
            if media.grid is not None:
                grids.setdefault(f"{media.encoder}_grid_thw", []).append(media.grid)
            if media.seconds is not None:
                grids.setdefault("second_per_grid_ts", []).append(media.seconds)
        for target in sample.targets:
            target_rows += range(first + target.start, first + target.start + target.rows)
            microbatch.targets.append(
                TargetItem(target.generator, target.rows, target.shape, target.seed, target.cost, origin=i)
            )
    microbatch.inputs |= {name: torch.tensor(values) for name, values in grids.items()}
    positions = torch.tensor(labelled, dtype=torch.long)
    microbatch.labels = ids_BS.flatten()[positions]
    microbatch.label_positions = positions - 1  # the token before predicts it
    microbatch.media_positions = torch.tensor(media_rows, dtype=torch.long)
    microbatch.target_positions = torch.tensor(target_rows, dtype=torch.long)
    return microbatch


def split_evenly(samples: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    """At most `parts` runs of consecutive samples. None is empty, and their lengths differ by at most one."""
    parts = min(parts, len(samples))
    bounds = [i * len(samples) // parts for i in range(parts + 1)]
    return [samples[start:stop] for start, stop in pairwise(bounds)]
