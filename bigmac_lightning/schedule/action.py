"""One entry of a rank's list, and its text form.

Knows the notation that plans, logs, tests, traces and profiler ranges share; knows nothing of ranks or of order.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast

Kind = Literal["F", "B", "I", "W", "EF", "EB", "G"]
"""F, B: forward and full backward of a stage. I, W: the halves of B that give input and weight gradients.
EF, EB: forward and backward of a rank's share of a group's encoder work. G: forward and backward of the generator's."""

_PATTERN = re.compile(r"(?:(\d+)([FBIW])(\d+)|(EF|EB|G)(\d+)(?:\.(\d+)/(\d+))?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work in a rank's list.

    Attributes:
        kind: what is done.
        index: the microbatch of F, B, I and W; the group of EF, EB and G.
        stage: the stage of F, B, I and W; ``None`` for EF, EB and G.
        piece: which of `pieces` equal parts of the share this is, counted from 0.
        pieces: in how many parts the share is cut.
    """

    kind: Kind
    index: int
    stage: int | None = None
    piece: int = 0
    pieces: int = 1

    @property
    def nested(self) -> bool:
        """Whether this is encoder or generator work, nested into the backbone."""
        return self.stage is None

    def __str__(self) -> str:
        if self.stage is not None:
            return f"{self.stage}{self.kind}{self.index}"
        part = f".{self.piece}/{self.pieces}" if self.pieces > 1 else ""
        return f"{self.kind}{self.index}{part}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The action whose text this is.

        Raises:
            ValueError: for anything that ``str(action)`` cannot give.
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
