"""Which rows of which rank belong to which microbatch.

A rank's share of a group may be cut into pieces: runs of items of nearly equal cost. A piece's rows lie one after
another in a buffer, item by item, microbatch by microbatch; a microbatch's rows lie item by item whoever owns them.
`gather` and `scatter` go from one to the other, for values and gradients alike.
Pure bookkeeping over metadata: every rank computes the same.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Place = tuple[int, int]
"""A rank, and the piece of its share."""


class Item(NamedTuple):
    """One media item or generator target, as far as routing has to know it."""

    owner: int
    rows: int
    cost: float = 1.0


class Routing:
    """Rows of all items of a batch.

    Args:
        items: per microbatch, its items in order.
        groups: microbatches of each group.
        pieces: by group and rank, into how many pieces that rank's share is cut; 1 where nothing is said.
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
        for g, group in enumerate(groups):
            cutters: dict[int, _Cutter] = {}
            owned: dict[int, list[float]] = {}
            for m in group:
                for item in items[m]:
                    owned.setdefault(item.owner, []).append(item.cost)
            for rank, costs in owned.items():
                cutters[rank] = _Cutter(sum(costs), self._pieces.get((g, rank), 1))
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
        """Rows of a piece of a rank's share of a group; 0 if there are fewer items than pieces."""
        return self._rows.get((group, place), 0)

    def items(self, group: int, place: Place) -> list[tuple[int, int]]:
        """(microbatch, position in the microbatch's items) of each item of a piece."""
        return self._items.get((group, place), [])

    def places(self, group: int) -> list[Place]:
        """All pieces of the ranks that own something of the group, also empty ones."""
        return self._places[group]

    def has_items(self, microbatch: int) -> bool:
        return bool(self._slices[microbatch])

    def rows_of(self, microbatch: int) -> int:
        """Rows of a microbatch's items together."""
        return sum(rows for *_, rows in self._slices[microbatch])

    def gather(self, microbatch: int, buffers: Mapping[Place, Tensor]) -> Tensor:
        """A microbatch's rows, from the buffers of all pieces."""
        return _joined([buffers[place][start : start + rows] for place, start, _, rows in self._slices[microbatch]])

    def scatter(self, group: int, place: Place, microbatches: Mapping[int, Tensor]) -> Tensor:
        """A piece's buffer, from the rows of the group's microbatches."""
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
    """Cuts a run of items into pieces: an item goes where the middle of its cost lies."""

    def __init__(self, total: float, pieces: int) -> None:
        self.total, self.pieces, self.before = total, pieces, 0.0

    def piece_of_next(self, cost: float) -> int:
        middle = self.before + cost / 2
        self.before += cost
        return min(self.pieces - 1, int(middle / self.total * self.pieces)) if self.total else 0


def _joined(parts: list[Tensor]) -> Tensor:
    """Without a copy where there is nothing to join."""
    return parts[0].detach() if len(parts) == 1 else torch.cat(parts)
