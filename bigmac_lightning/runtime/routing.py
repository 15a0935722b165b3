"""Maps the rows of encoder features (or generator conditions) between ranks' pieces and microbatches.

Each media item (or generator target) has a number of rows, and one rank owns it. A rank's share of a group may be cut
into pieces, which are runs of items with nearly equal costs. There are two layouts of the same rows. The buffer of a
piece, [rows, width], has the rows of its items, microbatch by microbatch. The rows of a microbatch, [rows, width], are
in the order of its items, whichever ranks own them. `gather` goes from pieces to a microbatch, `scatter` from
microbatches to a piece, for values and gradients alike.

The layouts follow from metadata that all ranks have, so every rank computes the same ones and no sizes need to be sent.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Place = tuple[int, int]
"""A rank, and the number of a piece of its share."""


class Item(NamedTuple):
    """One media item or generator target.

    Attributes:
        owner: pipeline rank that computes it.
        rows: number of its rows of features or conditions.
        cost: its cost in any unit, by which a share is cut into pieces.
    """

    owner: int
    rows: int
    cost: float = 1.0


class Routing:
    """The layout of the rows of all items of a batch.

    Args:
        items: per microbatch, its items in order.
        groups: per group, its microbatches.
        pieces: by (group, rank), the number of pieces that the rank's share is cut into, also if it is empty; 1 for
            keys that are missing.
    """

    def __init__(
        self,
        items: Sequence[Sequence[Item]],
        groups: Sequence[Sequence[int]],
        pieces: Mapping[tuple[int, int], int] | None = None,
    ) -> None:
        self.groups = groups
        self.group_of = {m: g for g, group in enumerate(groups) for m in group}
        self._pieces = dict(pieces or {})
        self._rows: dict[tuple[int, Place], int] = {}
        self._items: dict[tuple[int, Place], list[tuple[int, int]]] = {}
        self._places: list[list[Place]] = []
        # per microbatch: (place, first row in that buffer, first row in the microbatch, rows)
        self._slices: list[list[tuple[Place, int, int, int]]] = [[] for _ in items]
        ranks_of: dict[int, list[int]] = {}
        for g, rank in self._pieces:
            ranks_of.setdefault(g, []).append(rank)
        for g, group in enumerate(groups):
            cutters: dict[int, _Cutter] = {}
            owned: dict[int, list[float]] = {}
            for m in group:
                for item in items[m]:
                    owned.setdefault(item.owner, []).append(item.cost)
            for rank, costs in owned.items():
                cutters[rank] = _Cutter(sum(costs), self._pieces.get((g, rank), 1))
            for rank in ranks_of.get(g, ()):
                cutters.setdefault(rank, _Cutter(0.0, self._pieces[g, rank]))
            self._places.append([(rank, piece) for rank in sorted(cutters) for piece in range(cutters[rank].pieces)])
            for m in group:
                offset = 0
                for i, item in enumerate(items[m]):
                    place = (item.owner, cutters[item.owner].piece_of_next(item.cost))
                    start = self._rows.get((g, place), 0)
                    self._slices[m].append((place, start, offset, item.rows))
                    self._rows[g, place] = start + item.rows
                    self._items.setdefault((g, place), []).append((m, i))
                    offset += item.rows

    def rows(self, group: int, place: Place) -> int:
        """Number of rows of a piece; 0 for an empty piece, as there is if a share has fewer items than pieces."""
        return self._rows.get((group, place), 0)

    def items(self, group: int, place: Place) -> list[tuple[int, int]]:
        """The items of a piece, each as (microbatch, position in the microbatch's items)."""
        return self._items.get((group, place), [])

    def places(self, group: int) -> list[Place]:
        """All pieces of a group, also empty ones, of all ranks that own items of the group."""
        return self._places[group]

    def has_items(self, microbatch: int) -> bool:
        """Whether a microbatch has items."""
        return bool(self._slices[microbatch])

    def rows_of(self, microbatch: int) -> int:
        """Number of rows of all items of a microbatch."""
        return sum(rows for *_, rows in self._slices[microbatch])

    def gather(self, microbatch: int, buffers: Mapping[Place, Tensor]) -> Tensor:
        """Return the rows of a microbatch, [rows, width], from the buffers of its group's pieces."""
        return _joined([buffers[place][start : start + rows] for place, start, _, rows in self._slices[microbatch]])

    def scatter(self, group: int, place: Place, microbatches: Mapping[int, Tensor]) -> Tensor:
        """Return the buffer of a piece, [rows, width], from the rows of its group's microbatches."""
        parts = [
            microbatches[m][offset : offset + rows]
            for m in self.groups[group]
            for owner, _, offset, rows in self._slices[m]
            if owner == place
        ]
        if not parts:
            return next(iter(microbatches.values()))[:0]
        return _joined(parts)


class _Cutter:
    """Cuts a rank's items of a group into pieces of nearly equal cost, item by item in order.

    Imagine the items in a row, as long as their costs, which is divided into equal parts: an item belongs to the part
    that has the item's middle.
    """

    def __init__(self, total: float, pieces: int) -> None:
        self.total, self.pieces, self.before = total, pieces, 0.0

    def piece_of_next(self, cost: float) -> int:
        """Return the number of the piece of the next item."""
        middle = self.before + cost / 2
        self.before += cost
        return min(self.pieces - 1, int(middle / self.total * self.pieces)) if self.total else 0


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate tensors. A single tensor is detached and not copied."""
    return parts[0].detach() if len(parts) == 1 else torch.cat(parts)
