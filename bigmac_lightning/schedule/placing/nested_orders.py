"""Sequences that nested actions may be done in, the same one on all ranks, within a limit on live encoder units.

Knows cuts, shares and units; knows nothing of times.
"""

from collections.abc import Iterator, Sequence

from bigmac_lightning.schedule.liveness import group_units
from bigmac_lightning.schedule.placing.nesting import Cut
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.workload import Workload


class NestedOrders:
    """The sequences of a plan's nested actions.

    Args:
        plan: its shares and groups give the encoder units.
        cuts: the nested actions in the order of the cuts; those without any share left out.
        max_encoder_units: most encoder units that a rank may have alive.
        workload: see ``liveness.group_units``.
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
        """The order of the cuts, and those with encoder forwards up to 1, 2, 4 .. groups earlier; each only once."""
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
        """Whether no rank ever has more encoder units alive than it may."""
        alive = [0.0] * max(map(len, self._sizes), default=0)
        for cut in sequence:
            if cut.kind == "EF" and not self._fits(alive, cut):
                return False
            self._hold(alive, cut)
        return True

    def _sequence(self, ahead: int) -> list[Cut]:
        """Encoder forwards as early as the limit allows, but at most `ahead` groups earlier than in the cuts."""
        alive = [0.0] * max(map(len, self._sizes), default=0)
        forwards = [cut for cut in self._cuts if cut.kind == "EF"]
        result: list[Cut] = []
        wanted = done = 0
        for cut in self._cuts:
            if cut.kind == "EF":
                wanted += 1
            while done < min(wanted + ahead, len(forwards)) and self._fits(alive, forwards[done]):
                result.append(forwards[done])
                self._hold(alive, forwards[done])
                done += 1
            if cut.kind != "EF":
                result.append(cut)
                self._hold(alive, cut)
        return result + forwards[done:]

    def _fits(self, alive: list[float], cut: Cut) -> bool:
        return all(held + size <= self._limit for held, size in zip(alive, self._sizes[cut.group], strict=True))

    def _hold(self, alive: list[float], cut: Cut) -> None:
        """Take an encoder forward's units, or free those of a backward."""
        if cut.kind != "G" and self._trained:
            for rank, size in enumerate(self._sizes[cut.group]):
                alive[rank] += size if cut.kind == "EF" else -size
