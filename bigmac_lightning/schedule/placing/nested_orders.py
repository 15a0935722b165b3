"""Orders in which all ranks may execute the nested actions, within a limit on the live encoder units.

A plan has one such sequence for all ranks (see ``verify``). The filling pass tries several of them.
"""

from collections.abc import Iterator, Sequence

from bigmac_lightning.schedule.liveness import group_units
from bigmac_lightning.schedule.placing.cut import Cut
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.workload import Workload


class NestedOrders:
    """Sequences of a plan's nested actions.

    Args:
        plan: its shares and groups give the encoder units.
        cuts: the cuts in order of time, without those whose group has no such work.
        max_encoder_units: limit on the encoder units alive on a rank.
        workload: the work of each microbatch, see ``liveness.group_units``.
    """

    def __init__(self, plan: Plan, cuts: list[Cut], max_encoder_units: float, workload: Workload | None = None) -> None:
        self._cuts, self._limit = cuts, max_encoder_units + 1e-9
        self._trained = "EB" in plan.costs.kinds
        units = group_units(plan, workload)
        self._sizes = [
            [size * share for share in row]
            for size, row in zip(units, plan.encoder_shares or [[]] * len(units), strict=True)
        ]

    def sequences(self) -> Iterator[list[Cut]]:
        """Yield the order of the cuts, then those in which encoder forwards are up to 1, 2, 4 .. groups earlier.

        Each sequence is yielded once, and only if it keeps the limit. Doubling the number keeps the sequences few,
        since the filling pass makes several schedules of each.
        """
        seen: list[list[Cut]] = []
        ahead = 0
        while True:
            sequence = self._sequence(ahead)
            if sequence not in seen and self.keeps_limit(sequence):
                seen.append(sequence)
                yield sequence
            if ahead >= len(self._cuts):
                return
            ahead = 2 * ahead or 1

    def keeps_limit(self, sequence: Sequence[Cut]) -> bool:
        """Whether the encoder units alive on a rank never exceed the limit."""
        alive = [0.0] * max(map(len, self._sizes), default=0)
        for cut in sequence:
            if cut.kind == "EF" and not self._fits(alive, cut):
                return False
            self._update(alive, cut)
        return True

    def _sequence(self, ahead: int) -> list[Cut]:
        """Return the sequence with encoder forwards as early as the limit allows, but at most `ahead` groups earlier
        than in the order of the cuts. It may exceed the limit if the order of the cuts does."""
        alive = [0.0] * max(map(len, self._sizes), default=0)
        forwards = [cut for cut in self._cuts if cut.kind == "EF"]
        result: list[Cut] = []
        due = done = 0
        for cut in self._cuts:
            if cut.kind == "EF":
                due += 1
            while done < min(due + ahead, len(forwards)) and self._fits(alive, forwards[done]):
                result.append(forwards[done])
                self._update(alive, forwards[done])
                done += 1
            if cut.kind != "EF":
                result.append(cut)
                self._update(alive, cut)
        return result + forwards[done:]

    def _fits(self, alive: list[float], cut: Cut) -> bool:
        """Whether an encoder forward's units can be added to those that are alive on each rank."""
        return all(units + size <= self._limit for units, size in zip(alive, self._sizes[cut.group], strict=True))

    def _update(self, alive: list[float], cut: Cut) -> None:
        """Add the units of an encoder forward to those alive on each rank, or subtract those of an encoder backward."""
        if cut.kind != "G" and self._trained:
            for rank, size in enumerate(self._sizes[cut.group]):
                alive[rank] += size if cut.kind == "EF" else -size
