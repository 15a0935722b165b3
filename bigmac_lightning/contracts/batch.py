"""What travels from a DataModule to the ranks of a pipeline.

Every rank sees all tokens, positions and media *metadata* of a batch; pixels and generator targets are present only
on the rank that owns the item.

Shape suffixes: B samples of a microbatch, S tokens, L labelled positions, N rows (of features or conditions).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.schedule.groups import even_groups, ramp_groups

PROMPT_TOKENS = "prompt_tokens"
"""The input with the number of tokens before the first labelled one of each row, of which some models make masks."""

MediaData = Tensor | dict[str, Tensor]
"""Pixels of an item; or a dict with the pixels as "pixel_values" and further tensors that its encoder takes."""


@dataclass(frozen=True)
class PipelineLayout:
    """This process's place in its pipeline, as far as a collate function has to know it.

    Attributes:
        size: number of ranks in the pipeline; 1 without pipeline parallelism.
        rank: this process's rank in the pipeline.
        group_size: microbatches per group; see ``assign_owners``.
        microbatches: how many microbatches the strategy expects per batch; ``None``: as many as the data has.
        encoder_ranks: ranks that may own media items; ``None``: all.
        generator_ranks: ranks that may own generator targets; ``None``: all.
        ramp: whether the first and the last groups are smaller; see ``ramp_groups``.
        weights: each rank's fraction of the encoder and generator work; ``None``: all ranks do equally much.
        peers: number of processes that a rank consists of, which divide its items among themselves.
        peer: which of them this process is.
    """

    size: int = 1
    rank: int = 0
    group_size: int = 1
    microbatches: int | None = None
    encoder_ranks: tuple[int, ...] | None = None
    generator_ranks: tuple[int, ...] | None = None
    ramp: bool = False
    weights: tuple[float, ...] | None = None
    peers: int = 1
    peer: int = 0

    def owns(self, item: "MediaItem | TargetItem") -> bool:
        """Whether this process decodes and computes an item."""
        return item.owner == self.rank and item.peer == self.peer

    def groups(self, microbatches: int) -> list[list[int]]:
        """The microbatches of each group."""
        return (ramp_groups if self.ramp else even_groups)(microbatches, self.group_size)


@dataclass
class MediaItem:
    """One image, video, ... of a microbatch.

    Attributes:
        encoder: name of the encoder that turns it into features.
        rows: number of feature rows (LLM tokens) it turns into.
        cost: encoder forward time in any unit shared by all items of a batch.
        owner: rank of the pipeline that decodes and encodes it.
        peer: which of the rank's processes does.
        data: on the owner, the encoder's input; ``None`` on other ranks.
        origin: index of its sample in `Microbatch.origins`.
        error: on the owner, the reason if `data` could not be read; else ``None``.
    """

    encoder: str
    rows: int
    cost: float = 1.0
    owner: int = 0
    peer: int = 0
    data: MediaData | None = None
    origin: int = 0
    error: str | None = None


@dataclass
class TargetItem:
    """One thing that a generator learns to make, conditioned on hidden states of its microbatch.

    Attributes:
        generator: name of the generator.
        rows: number of condition rows (final hidden states) it reads.
        shape: shape of the target, known on all ranks.
        seed: seed of the noise and the timestep that are drawn for it, so that they do not depend on the ranks.
        cost: generator time in any unit shared by all items of a batch.
        owner: rank of the pipeline that runs the generator on it.
        peer: which of the rank's processes does.
        data: the target on the owner, ``None`` elsewhere (and when sampling).
        origin: index of its sample in `Microbatch.origins`.
        error: on the owner, the reason if `data` could not be read; else ``None``.
    """

    generator: str
    rows: int
    shape: tuple[int, ...]
    seed: int = 0
    cost: float = 1.0
    owner: int = 0
    peer: int = 0
    data: Tensor | None = None
    origin: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a sample lies in its microbatch.

    Attributes:
        name: the sample's name in error messages.
        start, stop: flat indices into B * S of its tokens.
    """

    name: str
    start: int
    stop: int


def _no_positions() -> Tensor:
    return torch.empty(0, dtype=torch.long)


@dataclass
class Microbatch:
    """One microbatch: what a single forward of an LLM stage works on.

    Attributes:
        inputs: tensors for the LLM, at least ``input_ids`` of shape (B, S); also ``position_ids``, ``attention_mask``.
        label_positions: (L,) flat indices into B * S whose hidden state predicts a labelled token.
        labels: (L,) the token ids to be predicted there (the *next* token of each of these positions).
        media: items in the order of their feature rows.
        media_positions: (N,) flat indices into B * S of the tokens of the feature rows, item after item. Rows replace
            their tokens, unless the LLM says otherwise (`adds_features`, `attends_to_features`).
        targets: generator targets in the order of their condition rows.
        target_positions: (N,) flat indices into B * S of the hidden states that condition them, item after item.
        origins: its samples; empty if the DataModule does not list them.
        llm_cost: time of an LLM stage in any unit shared by all microbatches of a batch; ``None``: the number of its
            tokens.
    """

    inputs: dict[str, Tensor]
    label_positions: Tensor = field(default_factory=_no_positions)
    labels: Tensor = field(default_factory=_no_positions)
    media: list[MediaItem] = field(default_factory=list)
    media_positions: Tensor = field(default_factory=_no_positions)
    targets: list[TargetItem] = field(default_factory=list)
    target_positions: Tensor = field(default_factory=_no_positions)
    origins: list[Origin] = field(default_factory=list)
    llm_cost: float | None = None

    @property
    def cost(self) -> float:
        """`llm_cost`, or the number of tokens."""
        return float(self.inputs["input_ids"].numel()) if self.llm_cost is None else self.llm_cost

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)"""
        batch, tokens = self.inputs["input_ids"].shape
        return batch, tokens

    @property
    def has_labels(self) -> bool:
        """Whether it has a text loss."""
        return len(self.labels) > 0

    @property
    def is_useful(self) -> bool:
        """Whether it has labels or targets. Without them there is no loss, and nothing to generate."""
        return self.has_labels or bool(self.targets)

    def with_prompt_tokens(self) -> "Microbatch":
        """A copy whose inputs say how many tokens each row has before its first labelled one: "prompt_tokens", (B,). Of
        a row without labels these are all but the padding."""
        if PROMPT_TOKENS in self.inputs:
            return self
        rows, tokens = self.shape
        known = self.inputs.get("token_mask")
        given = torch.full((rows,), tokens, device=self.label_positions.device) if known is None else known.sum(1)
        row_L, token_L = self.label_positions // tokens, self.label_positions % tokens
        counts = given.scatter_reduce(0, row_L, token_L + 1, "amin")
        return replace(self, inputs=self.inputs | {PROMPT_TOKENS: counts})

    def without_media(self) -> "Microbatch":
        """A copy without media items."""
        return replace(self, media=[], media_positions=self.media_positions[:0])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Microbatch":
        """A copy with every tensor passed through `function`."""

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        def media(data: MediaData | None) -> MediaData | None:
            return {k: function(v) for k, v in data.items()} if isinstance(data, dict) else optional(data)

        return replace(
            self,
            inputs={name: function(tensor) for name, tensor in self.inputs.items()},
            label_positions=function(self.label_positions),
            labels=function(self.labels),
            media=[replace(item, data=media(item.data)) for item in self.media],
            media_positions=function(self.media_positions),
            targets=[replace(item, data=optional(item.data)) for item in self.targets],
            target_positions=function(self.target_positions),
        )

    def without(self, origins: Collection[int]) -> "Microbatch":
        """A copy without the labels, media and targets of these samples.

        Their tokens stay, so that shapes do not change.
        """
        left_out = torch.zeros(self.inputs["input_ids"].numel(), dtype=torch.bool)
        for i in origins:
            left_out[self.origins[i].start : self.origins[i].stop] = True
        labelled, encoded, targeted = (
            ~left_out[positions] for positions in (self.label_positions, self.media_positions, self.target_positions)
        )
        return replace(
            self,
            label_positions=self.label_positions[labelled],
            labels=self.labels[labelled],
            media=[item for item in self.media if item.origin not in origins],
            media_positions=self.media_positions[encoded],
            targets=[item for item in self.targets if item.origin not in origins],
            target_positions=self.target_positions[targeted],
        )


class Batch:
    """All microbatches of one step of one pipeline, with the layout that its owners were chosen for.

    Lightning and its precision plugins do not convert its tensors; each component gets the type that it asks for.

    Attributes:
        planned: a `training.planner.PlannedBatch`, if a DataLoader's worker has planned the batch.
        progress: a note of the DataModule about its own progress, which nothing else reads.
        step_counts: the divisors of the loss sums over the whole optimizer step (see `PipelineModule.counts`), if the
            step has several batches and they are read ahead.
        slices: of each microbatch the slice that this process's stages compute, under context parallelism.
        fingerprint: a number that depends on all that the ranks of a pipeline must have alike of it, if it is known.
    """

    def __init__(
        self,
        microbatches: list[Microbatch],
        layout: PipelineLayout | None = None,
        planned: object = None,
        progress: object = None,
        step_counts: Sequence[float] | None = None,
        slices: list[Microbatch] | None = None,
        fingerprint: int | None = None,
    ) -> None:
        self.slices, self.fingerprint = slices, fingerprint
        self.microbatches, self.layout = microbatches, layout or PipelineLayout()
        self.planned, self.progress, self.step_counts = planned, progress, step_counts

    def replace(self, **changes: Any) -> "Batch":
        """A copy with other attributes."""
        return Batch(**{**vars(self), **changes})

    def __len__(self) -> int:
        return len(self.microbatches)

    def __iter__(self) -> Iterator[Microbatch]:
        return iter(self.microbatches)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """A copy on `device` (called by Lightning)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """A copy in pinned memory (called by the DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        made: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            """What several items have in common, they have in common afterwards. The batch holds all tensors that are
            given here, so no two of them have the same id."""
            if id(tensor) not in made:
                made[id(tensor)] = function(tensor)
            return made[id(tensor)]

        slices = None if self.slices is None else [one.map(once) for one in self.slices]
        microbatches = [microbatch.map(once) for microbatch in self.microbatches]
        return self.replace(microbatches=microbatches, slices=slices)

    def useful(self) -> "Batch":
        """A copy without the microbatches that have neither labels nor targets."""
        useful = [i for i, microbatch in enumerate(self.microbatches) if microbatch.is_useful]
        slices = None if self.slices is None else [self.slices[i] for i in useful]
        return Batch([self.microbatches[i] for i in useful], self.layout, slices=slices)

    def useful_media(self) -> "Batch":
        """A copy with all microbatches, but without the media of those that have neither labels nor targets."""

        def changed(microbatches: Sequence[Microbatch]) -> list[Any]:
            return [m if m.is_useful else m.without_media() for m in microbatches]

        slices = None if self.slices is None else changed(self.slices)
        return Batch(changed(self.microbatches), self.layout, slices=slices)

    def problem(self, size: int) -> str:
        """The reason why no plan can be made for a pipeline of `size` ranks; empty if one can be made."""
        for m, microbatch in enumerate(self.microbatches):
            if not (isfinite(microbatch.cost) and microbatch.cost > 0):
                return f"microbatch {m} has the LLM cost {microbatch.cost}: it must be a finite number above 0"
            for what, items in (("media", microbatch.media), ("target", microbatch.targets)):
                for item in items:
                    if not 0 <= item.owner < size:
                        return f"microbatch {m}: a {what} item has owner {item.owner}, not a pipeline rank"
                    if not (isfinite(item.cost) and item.cost >= 0):
                        return (
                            f"microbatch {m}: a {what} item has the cost {item.cost}: it must be a finite number >= 0"
                        )
        return ""

    @property
    def labels(self) -> Tensor:
        """(sum of L,) labels of all microbatches, in the order of ``PipelineOutput.predictions``."""
        labels = [microbatch.labels for microbatch in self.microbatches]
        return torch.cat(labels) if labels else _no_positions()

    @property
    def targets(self) -> list[TargetItem]:
        """Generator targets of all microbatches, in the order of ``PipelineOutput.samples``."""
        return [item for microbatch in self.microbatches for item in microbatch.targets]

    @property
    def samples(self) -> int:
        return sum(len(microbatch.origins) or microbatch.shape[0] for microbatch in self.microbatches)

    @property
    def tokens(self) -> int:
        return sum(microbatch.inputs["input_ids"].numel() for microbatch in self.microbatches)
