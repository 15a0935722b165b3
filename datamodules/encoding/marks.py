"""Finds the places of the texts of messages in the text that a chat template makes of them.

A template is a program: from its output alone one cannot see which part came from which message. So each piece of text
is put between two mark characters that no text contains, the template is applied, and the marks are removed again. What
is left must equal the output without marks. If it does not, the template inspects its messages in a way that the marks
disturb, and the places are not known.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import ExampleError

PLANES = (0x100000, 0xF0000)
"""The first characters of the two planes of Unicode for private use. Few texts have characters of one of them, and none
should have characters of both."""

PER_PLANE = 0xFFFE
"""Number of characters in such a plane: the last two of each plane are no characters."""


@dataclass(frozen=True)
class Piece:
    """A marked piece of text.

    Attributes:
        message: the number of its message.
        kind: "content", "reasoning", "name" or "argument".
    """

    message: int
    kind: str


@dataclass(frozen=True)
class Place:
    """The place of a piece in a text.

    Attributes:
        piece: the number of the piece.
        start, stop: the run of its characters.
    """

    piece: int
    start: int
    stop: int


@dataclass(frozen=True)
class Found:
    """A text and the places of pieces in it.

    Attributes:
        text: without marks.
        places: the first place of each piece that the text has, in their order.
        repeated: further places of these pieces.
    """

    text: str
    places: list[Place]
    repeated: list[Place]

    def after_last(self) -> tuple[int | None, str]:
        """The number of the last piece, and the text after it."""
        if not self.places:
            return None, self.text
        last = max(self.places, key=lambda place: place.stop)
        return last.piece, self.text[last.stop :]


@dataclass
class Marker:
    """Marks texts; it is a `Mark` of template.py.

    Args:
        text: the template's output without marks.
        cuts: patterns, each with one group, of strings that are not marked, since the template looks for them: first
            for the assistant's messages, then for all others.
        closers: those strings of the first pattern that end the assistant's reasoning.
        speakers: numbers of the assistant's messages.

    Attributes:
        pieces: all pieces that have been marked.
    """

    text: str
    cuts: tuple[re.Pattern[str], re.Pattern[str]]
    closers: frozenset[str]
    speakers: frozenset[int]
    pieces: list[Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        ranges = [f"{chr(first)}-{chr(first + PER_PLANE - 1)}" for first in PLANES]
        free = [i for i, characters in enumerate(ranges) if not re.search(f"[{characters}]", self.text)]
        if not free:
            raise ExampleError("has a text with characters of both private planes of Unicode, U+F0000 and U+100000")
        self._first, self._marks = PLANES[free[0]], re.compile(f"([{ranges[free[0]]}])")

    def __call__(self, text: str, message: int, kind: str) -> str:
        speaks = message in self.speakers
        parts = self.cuts[0 if speaks else 1].split(text)
        if len(parts) == 1:
            return self._mark(text, message, kind)
        last_closer = -1
        if kind == "content" and speaks:
            last_closer = max((i for i, part in enumerate(parts) if part in self.closers), default=-1)
        marked = [
            part if i % 2 else self._mark(part, message, "reasoning" if i < last_closer else kind)
            for i, part in enumerate(parts)
        ]
        return "".join(marked)

    def _mark(self, text: str, message: int, kind: str) -> str:
        """Mark a text. Blanks at both ends stay outside the marks, since templates strip them."""
        inner = text.strip()
        if not inner:
            return text
        number = self._first + 2 * len(self.pieces)
        if number + 2 > self._first + PER_PLANE:
            raise ExampleError(f"has more than {PER_PLANE // 2} pieces of text")
        self.pieces.append(Piece(message, kind))
        start = text.index(inner)
        return f"{text[:start]}{chr(number)}{inner}{chr(number + 1)}{text[start + len(inner) :]}"

    def read(self, marked: str) -> Found:
        """Remove the marks from the template's output."""
        texts: list[str] = []
        opened: dict[int, int] = {}
        places: dict[int, Place] = {}
        repeated: list[Place] = []
        at = 0
        for i, part in enumerate(self._marks.split(marked)):
            if i % 2 == 0:
                texts.append(part)
                at += len(part)
                continue
            piece, closes = divmod(ord(part) - self._first, 2)
            if not closes:
                opened[piece] = at
            elif piece in opened:
                place = Place(piece, opened.pop(piece), at)
                if places.setdefault(piece, place) is not place:
                    repeated.append(place)
        return Found("".join(texts), sorted(places.values(), key=lambda place: place.start), repeated)


def common_start(one: str, other: str) -> int:
    """The number of characters at the start that two texts share."""
    if one.startswith(other) or other.startswith(one):
        return min(len(one), len(other))
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def alternatives(texts: Sequence[str]) -> str:
    """A pattern that matches any of the texts, the longest first; without texts, it matches nothing."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
