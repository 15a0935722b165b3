"""Which rank of a pipeline, and which of its peers, encodes a media item or computes the loss of a target."""

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from bigmac_lightning.contracts.batch import MediaItem, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.schedule.assign import assign


def assign_owners(microbatches: Sequence[Microbatch], layout: PipelineLayout) -> None:
    """Set the owner of every media item and generator target, balanced by cost over the groups, in place. A target at
    the tokens of a media item is the same picture; it gets the same owner, if that rank may own targets.

    Only costs are read, so this can run before anything is decoded.
    """
    everyone = tuple(range(layout.size))
    groups = layout.groups(len(microbatches))
    media = [[item for m in group for item in microbatches[m].media] for group in groups]
    targets = [[item for m in group for item in microbatches[m].targets] for group in groups]
    _share_out(media, "owner", layout.encoder_ranks or everyone, layout.weights)
    same = [pair for microbatch in microbatches for pair in _same_pictures(microbatch)]
    same = [(target, item) for target, item in same if item.owner in (layout.generator_ranks or everyone)]
    for target, item in same:
        target.owner = item.owner
    known = {id(target) for target, _ in same}
    _share_out(targets, "owner", layout.generator_ranks or everyone, layout.weights, known)
    if layout.peers > 1:
        for rank in everyone:
            _share_out([[i for i in items if i.owner == rank] for items in media], "peer", range(layout.peers))
        for target, item in same:
            target.peer = item.peer
        for rank in everyone:
            own = [[i for i in items if i.owner == rank] for items in targets]
            _share_out(own, "peer", range(layout.peers), known=known)


def _same_pictures(microbatch: Microbatch) -> list[tuple[TargetItem, MediaItem]]:
    """The targets at the same tokens as media items, with these."""
    media, targets = (
        _by_tokens(items, positions)
        for items, positions in (
            (microbatch.media, microbatch.media_positions),
            (microbatch.targets, microbatch.target_positions),
        )
    )
    return [(targets[tokens], media[tokens]) for tokens in targets.keys() & media.keys()]


def _by_tokens(items: Sequence[Any], positions: Tensor) -> dict[tuple[int, int], Any]:
    """Items by their first token and their number of rows; empty if they have no places."""
    starts = [0, *accumulate(item.rows for item in items)]
    if not items or starts[-1] != len(positions):
        return {}
    first = positions[starts[:-1]].tolist()
    return {(token, item.rows): item for token, item in zip(first, items, strict=True)}


def _share_out(
    groups: Sequence[Sequence[MediaItem | TargetItem]],
    attribute: str,
    ranks: Sequence[int],
    weights: Sequence[float] | None = None,
    known: Collection[int] = (),
) -> None:
    """Balance items over ranks, or over peers.

    Args:
        attribute: which attribute of an item gets its rank.
        weights: each rank's fraction of the work.
        known: the ids of items that have their rank already.
    """
    # Work on items that have their rank, and other work of a rank with a smaller weight, keep it busy.
    costs = [sum(item.cost for item in items) for items in groups]
    busy = [[0.0 if weights is None else (max(weights) - weights[r]) * cost for r in ranks] for cost in costs]
    for items, times in zip(groups, busy, strict=True):
        for item in items:
            if id(item) in known:
                times[ranks.index(getattr(item, attribute))] += item.cost
    free = [[item for item in items if id(item) not in known] for items in groups]
    owners = assign([[item.cost for item in items] for items in free], ranks, busy)
    for items, ranks_of_items in zip(free, owners, strict=True):
        for item, rank in zip(items, ranks_of_items, strict=True):
            setattr(item, attribute, rank)
