"""Where the words of messages stand in the text that a chat template makes of them.

Each piece of text is put between two characters that no text has, the template is applied to that, and the characters
are taken out again. What is left must be the template's text without them: where it is not, the template looks at its
messages in a way that the marks disturb, and their places are not known. Knows texts; knows nothing of tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..example import ExampleError

PLANES = (0x100000, 0xF0000)
"""Planes of Unicode for private use. Hardly a text has a character of one, and none that makes sense of both."""
PER_PLANE = 0xFFFE


@dataclass(frozen=True)
class Piece:
    """What is marked.

    Attributes:
        message: its number.
        kind: "content", "reasoning", "name" or "argument".
    """

    message: int
    kind: str


@dataclass(frozen=True)
class Place:
    """Where a piece stands.

    Attributes:
        piece: its number.
        start, stop: of its characters in the text.
    """

    piece: int
    start: int
    stop: int


@dataclass(frozen=True)
class Found:
    """A text and the places of pieces in it, in their order; a piece that the text does not have has none.

    Attributes:
        repeated: places of pieces that have one already.
    """

    text: str
    places: list[Place]
    repeated: list[Place]

    def behind(self) -> tuple[int | None, str]:
        """The last piece, and the text behind it."""
        if not self.places:
            return None, self.text
        last = max(self.places, key=lambda place: place.stop)
        return last.piece, self.text[last.stop :]


@dataclass
class Marker:
    """Marks texts; see `Mark`.

    Args:
        text: what the template makes of them without marks.
        cuts: strings in texts that are left as they are, since the template looks for them; with one group. First
            those in what the assistant says, then those in all else.
        closers: of the first, those that end what the assistant thinks.
        speakers: numbers of the messages of the assistant.

    Attributes:
        pieces: what has been marked.
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
        thought = -1
        if kind == "content" and speaks:
            thought = max((i for i, part in enumerate(parts) if part in self.closers), default=-1)
        marked = [
            part if i % 2 else self._mark(part, message, "reasoning" if i < thought else kind)
            for i, part in enumerate(parts)
        ]
        return "".join(marked)

    def _mark(self, text: str, message: int, kind: str) -> str:
        """Blanks at both ends stay outside: templates strip them."""
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
        """The text without marks. Of a piece that it has several times, the first counts."""
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
    """Number of characters that two texts begin with alike."""
    if one.startswith(other) or other.startswith(one):
        return min(len(one), len(other))
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def alternatives(texts: Sequence[str]) -> str:
    """A pattern for any of them, the longest first; for none it finds nothing."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
