"""A text that will become tokens, with the runs of its characters that come from the example and that are learnt."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

Run = tuple[int, int]
"""The index of the first character of a run, and the index after its last."""

Edit = tuple[int, int, str]
"""A run of characters, given by its start and stop, and the text that replaces it."""


@dataclass(frozen=True)
class Text:
    """
    Attributes:
        text: the whole text.
        given: runs that come from the example, in their order. The template wrote the characters between them.
        learnt: runs that the model learns, in their order.
        whole: whether it was made without a template, so that the tokenizer adds its own special tokens.
    """

    text: str
    given: Sequence[Run]
    learnt: Sequence[Run]
    whole: bool = False

    def is_given(self, start: int, stop: int) -> bool:
        """Whether one of the characters of a run comes from the example."""
        return overlaps(self.given, start, stop)

    def edited(self, edits: Sequence[Edit]) -> "Text":
        """The text after edits, which must be in their order and must not overlap.

        A text that is inserted at the end of a learnt run is learnt. A text that is inserted at the end of a given run
        does not count as given.
        """
        if not edits:
            return self
        pieces: list[str] = []
        at = 0
        for start, stop, new in edits:
            pieces += [self.text[at:start], new]
            at = stop
        pieces.append(self.text[at:])
        starts, stops = [edit[0] for edit in edits], [edit[1] for edit in edits]
        grown = [0, *accumulate(len(new) - (stop - start) for start, stop, new in edits)]

        def after_edits(place: int) -> int:
            return place + grown[bisect_right(stops, place)]

        def before_edits(place: int) -> int:
            return place + grown[bisect_left(starts, place)]

        given = [(after_edits(a), before_edits(b)) for a, b in self.given]
        return Text("".join(pieces), given, [(after_edits(a), after_edits(b)) for a, b in self.learnt], self.whole)


def overlaps(runs: Sequence[Run], start: int, stop: int) -> bool:
    """Whether one of these runs, which must be in their order, shares a character with another run."""
    i = bisect_right(runs, start, key=lambda run: run[1])
    return i < len(runs) and runs[i][0] < stop and start < stop


def strings_in(value: object) -> Iterator[str]:
    """All texts in JSON data, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings_in([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def keys_in(value: object) -> Iterator[str]:
    """All keys in JSON data."""
    if isinstance(value, Mapping):
        yield from map(str, value)
        yield from keys_in([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from keys_in(item)
