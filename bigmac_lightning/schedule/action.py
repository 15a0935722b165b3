"""One action of a rank's list, and its text such as "2F0", which plan files, logs, traces and profiler ranges use."""

import re
from dataclasses import dataclass
from typing import Literal, cast

Kind = Literal["F", "B", "I", "W", "EF", "EB", "G"]
"""F and B are the forward and the full backward of a stage; I and W are the halves of B that compute input gradients
and weight gradients. EF and EB are the forward and the backward of a rank's share of a group's encoder work. G is the
forward and the backward of a rank's share of a group's generator work."""

_PATTERN = re.compile(r"(?:(\d+)([FBIW])(\d+)|(EF|EB|G)(\d+)(?:\.(\d+)/(\d+))?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of a rank's list.

    Attributes:
        kind: the kind of computation, see ``Kind``.
        index: the microbatch of F, B, I and W; the group of EF, EB and G.
        stage: the stage of F, B, I and W; ``None`` for EF, EB and G.
        piece: the number of this piece of the rank's share, counted from 0.
        pieces: the number of equal pieces that the share is cut into.
    """

    kind: Kind
    index: int
    stage: int | None = None
    piece: int = 0
    pieces: int = 1

    @property
    def nested(self) -> bool:
        """Whether this action is encoder or generator work, which is nested into the backbone."""
        return self.stage is None

    def __str__(self) -> str:
        if self.stage is not None:
            return f"{self.stage}{self.kind}{self.index}"
        part = f".{self.piece}/{self.pieces}" if self.pieces > 1 else ""
        return f"{self.kind}{self.index}{part}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Return the action that has this text.

        Raises:
            ValueError: no action has this text.
        """
        match = _PATTERN.fullmatch(text)
        if match:
            stage, kind, microbatch, nested_kind, group, piece, pieces = match.groups()
            if stage is not None:
                action = cls(cast(Kind, kind), int(microbatch), int(stage))
            else:
                action = cls(cast(Kind, nested_kind), int(group), None, int(piece or 0), int(pieces or 1))
            if str(action) == text and action.piece < action.pieces:
                return action
        raise ValueError(f"{text!r} is not an action; expected texts such as '2F0', '2B0', 'EF3', 'G3' or 'EF3.1/4'")
