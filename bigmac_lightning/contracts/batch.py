"""What travels from a DataModule to the ranks of a pipeline.

Every rank sees all tokens, positions and media *metadata* of a batch; pixels and generator targets are present only
on the rank that owns the item. Knows tensors and costs; knows nothing of Lightning, process groups or models.

Shape suffixes: B samples of a microbatch, S tokens, L labelled positions, N rows (of features or conditions).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.schedule.assign import assign
from bigmac_lightning.schedule.plan import even_groups, ramp_groups

MediaData = Tensor | dict[str, Tensor]
"""Pixels of an item; or, with whatever else its encoder has to know of it, as "pixel_values" of a dict."""


@dataclass(frozen=True)
class PipelineLayout:
    """This process's place in its pipeline, as far as a collate function has to know it.

    Attributes:
        size: ranks in the pipeline; 1 without pipeline parallelism.
        rank: this process's rank in the pipeline.
        group_size: microbatches per group; see ``assign_owners``.
        microbatches: how many microbatches the strategy expects per batch; ``None``: as many as the data has.
        encoder_ranks: ranks that may own media items; ``None``: all.
        generator_ranks: ranks that may own generator targets; ``None``: all.
        ramp: whether the first and the last groups are smaller; see ``ramp_groups``.
        weights: the fraction of encoder and generator work that each rank is to do; ``None``: the same for all.
    """

    size: int = 1
    rank: int = 0
    group_size: int = 1
    microbatches: int | None = None
    encoder_ranks: tuple[int, ...] | None = None
    generator_ranks: tuple[int, ...] | None = None
    ramp: bool = False
    weights: tuple[float, ...] | None = None

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
        data: what its encoder takes on the owner, ``None`` elsewhere.
        origin: index of its sample in `Microbatch.origins`.
        error: on the owner, why there is no data.
    """

    encoder: str
    rows: int
    cost: float = 1.0
    owner: int = 0
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
        seed: of the noise and timestep drawn for it: the same for any number of ranks.
        cost: generator time in any unit shared by all items of a batch.
        owner: rank of the pipeline that runs the generator on it.
        data: the target on the owner, ``None`` elsewhere (and when sampling).
        origin: index of its sample in `Microbatch.origins`.
        error: on the owner, why there is no data.
    """

    generator: str
    rows: int
    shape: tuple[int, ...]
    seed: int = 0
    cost: float = 1.0
    owner: int = 0
    data: Tensor | None = None
    origin: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a sample lies in its microbatch.

    Attributes:
        name: what errors call it.
        start, stop: flat indices into B * S.
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
        media_positions: (N,) flat indices into B * S that the feature rows replace, item after item.
        targets: generator targets in the order of their condition rows.
        target_positions: (N,) flat indices into B * S of the hidden states that condition them, item after item.
        origins: its samples, where the DataModule tells them.
        llm_cost: time of an LLM stage in any unit shared by all microbatches of a batch; ``None``: its tokens.
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
    def is_useful(self) -> bool:
        """Whether it has labels or targets: else nothing can be learnt or made from it."""
        return bool(len(self.labels) or self.targets)

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
        """A copy in which nothing is learnt or made from these samples and their media are not encoded.

        Their tokens stay, so that shapes do not change.
        """
        gone = torch.zeros(self.inputs["input_ids"].numel(), dtype=torch.bool)
        for i in origins:
            gone[self.origins[i].start : self.origins[i].stop] = True
        labelled, encoded, targeted = (
            ~gone[positions] for positions in (self.label_positions, self.media_positions, self.target_positions)
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

    Lightning and its precision plugins leave its contents alone: the components say what type their inputs are to have.

    Attributes:
        planned: a `planning.PlannedBatch`, where one was made together with the batch.
        progress: what the DataModule notes about it for itself.
        step_counts: what the losses of its whole optimizer step are divided by, where that has several batches.
    """

    def __init__(
        self,
        microbatches: list[Microbatch],
        layout: PipelineLayout | None = None,
        planned: object = None,
        progress: object = None,
        step_counts: Sequence[float] | None = None,
    ) -> None:
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
        return self.replace(microbatches=[microbatch.map(function) for microbatch in self.microbatches])

    def useful(self) -> "Batch":
        """Without the microbatches that have neither labels nor targets: nothing can be learnt or made from them."""
        return Batch([m for m in self.microbatches if m.is_useful], self.layout)

    def problem(self, size: int) -> str:
        """Why no plan can be made for a pipeline of `size` ranks; empty: one can."""
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


def assign_owners(microbatches: Sequence[Microbatch], layout: PipelineLayout) -> None:
    """Set the owner of every media item and generator target, balanced by cost over the groups, in place.

    Needs costs only, so that it can run before anything is decoded.
    """
    everyone = tuple(range(layout.size))
    groups = layout.groups(len(microbatches))
    media = [[item for m in group for item in microbatches[m].media] for group in groups]
    targets = [[item for m in group for item in microbatches[m].targets] for group in groups]
    _share_out(media, layout.encoder_ranks or everyone, layout.weights)
    _share_out(targets, layout.generator_ranks or everyone, layout.weights)


def _share_out(
    groups: Sequence[Sequence[MediaItem | TargetItem]], ranks: Sequence[int], weights: Sequence[float] | None
) -> None:
    costs = [[item.cost for item in items] for items in groups]
    # a rank that is to do less than another has that much else to do
    busy = None if weights is None else [[(max(weights) - weights[r]) * sum(row) for r in ranks] for row in costs]
    owners = assign(costs, ranks, busy)
    for items, chosen in zip(groups, owners, strict=True):
        for item, owner in zip(items, chosen, strict=True):
            item.owner = owner
