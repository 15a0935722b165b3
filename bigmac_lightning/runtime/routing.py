"""Which rows of which rank belong to which microbatch.

A share's rows lie one after another in a buffer, item by item, microbatch by microbatch; a microbatch's rows lie item
by item whoever owns them. `gather` and `scatter` go from one to the other, for values and gradients alike.
Pure bookkeeping over metadata: every rank computes the same.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Routing:
    """Rows of all items of a batch.

    Args:
        items: per microbatch, (owner rank, rows) of each item in order.
        groups: microbatches of each group.
    """

    def __init__(self, items: Sequence[Sequence[tuple[int, int]]], groups: Sequence[Sequence[int]]) -> None:
        self.groups = groups
        self.group_of = {m: g for g, group in enumerate(groups) for m in group}
        self._rows: dict[tuple[int, int], int] = {}
        self._items: dict[tuple[int, int], list[tuple[int, int]]] = {}
        # per microbatch: (owner, first row in the owner's buffer, first row in the microbatch, rows)
        self._slices: list[list[tuple[int, int, int, int]]] = [[] for _ in items]
        for g, group in enumerate(groups):
            for m in group:
                offset = 0
                for i, (owner, rows) in enumerate(items[m]):
                    start = self._rows.get((g, owner), 0)
                    self._slices[m].append((owner, start, offset, rows))
                    self._rows[g, owner] = start + rows
                    self._items.setdefault((g, owner), []).append((m, i))
                    offset += rows

    def rows(self, group: int, rank: int) -> int:
        """Rows of a rank's share of a group."""
        return self._rows.get((group, rank), 0)

    def items(self, group: int, rank: int) -> list[tuple[int, int]]:
        """(microbatch, position in the microbatch's items) of each item of a rank's share of a group."""
        return self._items.get((group, rank), [])

    def ranks(self, group: int) -> list[int]:
        """Ranks that own something of the group."""
        return sorted(rank for g, rank in self._items if g == group)

    def has_items(self, microbatch: int) -> bool:
        return bool(self._slices[microbatch])

    def gather(self, microbatch: int, buffers: Mapping[int, Tensor]) -> Tensor:
        """A microbatch's rows, from the buffers of the ranks."""
        return _joined([buffers[owner][start : start + rows] for owner, start, _, rows in self._slices[microbatch]])

    def scatter(self, group: int, rank: int, microbatches: Mapping[int, Tensor]) -> Tensor:
        """A rank's buffer, from the rows of the group's microbatches."""
        parts = [
            microbatches[m][offset : offset + rows]
            for m in self.groups[group]
            for owner, _, offset, rows in self._slices[m]
            if owner == rank
        ]
        return _joined(parts)


def _joined(parts: list[Tensor]) -> Tensor:
    """Without a copy where there is nothing to join."""
    return parts[0].detach() if len(parts) == 1 else torch.cat(parts)
