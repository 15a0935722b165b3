"""A place in the bare schedule at which nested work is inserted."""

from dataclasses import dataclass

from bigmac_lightning.schedule.action import Kind

_RANK_AT_EQUAL_TIME: dict[Kind, int] = {"EB": 0, "G": 1, "EF": 2}  # EB comes first: it frees memory that EF allocates


@dataclass(frozen=True)
class Cut:
    """A point in time of the bare schedule at which a group's work of one kind is inserted.

    Attributes:
        time: the time; actions that start at or after it come after the inserted work.
        kind: kind of the work, EF, EB or G.
        group: number of the group.
    """

    time: float
    kind: Kind
    group: int

    @property
    def order(self) -> tuple[float, int, int]:
        """By which cuts are sorted: at equal times EB comes first, then G, then EF."""
        return self.time, _RANK_AT_EQUAL_TIME[self.kind], self.group
