"""A rank's list, written down by kind and stage: each new action takes the stage's next microbatch of that kind.

Knows counting only; for builders whose papers tell schedules as loops over phases.
"""

from collections import Counter, deque

from bigmac_lightning.schedule.action import Action, Kind


class RankList:
    """The actions of one rank.

    Attributes:
        actions: what has been added so far.
    """

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._counts: Counter[tuple[str, int]] = Counter()
        self._owed: deque[tuple[int, int]] = deque()

    def add(self, stage: int, kinds: str) -> None:
        """Add these kinds, one letter each, on the stage's next microbatch; a W is then owed for each I.

        "B" and "I" share one count: a microbatch has the one or the other.
        """
        for kind in kinds:
            counted = ("F" if kind == "F" else "B", stage)
            microbatch = self._counts[counted]
            self._counts[counted] += 1
            self._put("F" if kind == "F" else "B" if kind == "B" else "I", microbatch, stage)
            if kind == "I":
                self._owed.append((microbatch, stage))

    def add_weights(self, stage: int | None = None, most: int = 1) -> None:
        """Add the oldest owed Ws, up to `most`; of one stage, or of any."""
        for _ in range(most):
            found = next((entry for entry in self._owed if stage in (None, entry[1])), None)
            if found is None:
                return
            self._owed.remove(found)
            self._put("W", *found)

    def count(self, kind: str, stage: int) -> int:
        """How many forwards ("F") or backwards ("B") the stage has."""
        return self._counts[kind, stage]

    def first(self, microbatches: int) -> list[Action]:
        """The actions of the first `microbatches` only: what is left of a valid schedule is a valid one."""
        return [action for action in self.actions if action.index < microbatches]

    def _put(self, kind: Kind, microbatch: int, stage: int) -> None:
        self.actions.append(Action(kind, microbatch, stage))
