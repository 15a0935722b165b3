"""Builds a rank's list by kind and stage only: each new action takes the next microbatch of its stage and kind.

It serves builders of schedules that the papers describe as loops over phases.
"""

from collections import Counter, deque

from bigmac_lightning.schedule.action import Action, Kind


class RankList:
    """The actions of one rank.

    Attributes:
        actions: the actions that have been added so far, in order.
    """

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._counts: Counter[tuple[str, int]] = Counter()
        self._pending_weights: deque[tuple[int, int]] = deque()  # (microbatch, stage) of each I that has no W yet

    def add(self, stage: int, kinds: str) -> None:
        """Add actions of these kinds ("F", "B" or "I", one letter each) on the stage's next microbatch of that kind.

        "B" and "I" share one count, because a microbatch has the one or the other. The W of an "I" is pending until
        `add_weights` adds it.
        """
        for kind in kinds:
            counted = ("F" if kind == "F" else "B", stage)
            microbatch = self._counts[counted]
            self._counts[counted] += 1
            self._append("F" if kind == "F" else "B" if kind == "B" else "I", microbatch, stage)
            if kind == "I":
                self._pending_weights.append((microbatch, stage))

    def add_weights(self, stage: int | None = None, most: int = 1) -> None:
        """Add the oldest pending Ws of a stage, or of all stages if it is ``None``, but at most `most` of them."""
        for _ in range(most):
            found = next((entry for entry in self._pending_weights if stage in (None, entry[1])), None)
            if found is None:
                return
            self._pending_weights.remove(found)
            self._append("W", *found)

    def count(self, kind: str, stage: int) -> int:
        """Return the number of forwards (kind "F") or of backwards (kind "B", which counts both B and I) of a stage."""
        return self._counts[kind, stage]

    def first(self, microbatches: int) -> list[Action]:
        """Return the actions of the first microbatches only.

        They are a valid schedule, because no action needs one of another microbatch.
        """
        return [action for action in self.actions if action.index < microbatches]

    def _append(self, kind: Kind, microbatch: int, stage: int) -> None:
        self.actions.append(Action(kind, microbatch, stage))
