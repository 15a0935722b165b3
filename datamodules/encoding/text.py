"""A text that is about to become tokens, and what is known of runs of its characters.

Knows texts; knows nothing of templates, tokenizers or media.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

Run = tuple[int, int]
"""First character, and the one behind the last."""

Edit = tuple[int, int, str]
"""A run, and what stands there instead."""


@dataclass(frozen=True)
class Text:
    """
    Attributes:
        text: all of it.
        given: runs that come from the example, in their order; what lies between them the template has written.
        learnt: runs that the model is to say, in their order.
        whole: whether nothing surrounds it, as a template does: the tokenizer's own special tokens belong to it.
    """

    text: str
    given: Sequence[Run]
    learnt: Sequence[Run]
    whole: bool = False

    def is_given(self, start: int, stop: int) -> bool:
        """Whether a run has a character that comes from the example."""
        return overlaps(self.given, start, stop)

    def edited(self, edits: Sequence[Edit]) -> "Text":
        """With edits made, which do not overlap each other and stand in their order.

        What is put in behind a learnt run is learnt; behind a given one, it is not given.
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

        def behind(place: int) -> int:
            return place + grown[bisect_right(stops, place)]

        def before(place: int) -> int:
            return place + grown[bisect_left(starts, place)]

        given = [(behind(a), before(b)) for a, b in self.given]
        return Text("".join(pieces), given, [(behind(a), behind(b)) for a, b in self.learnt], self.whole)


def overlaps(runs: Sequence[Run], start: int, stop: int) -> bool:
    """Whether one of the runs, which stand in their order, has a character of another."""
    i = bisect_right(runs, start, key=lambda run: run[1])
    return i < len(runs) and runs[i][0] < stop and start < stop


def strings_in(value: object) -> Iterator[str]:
    """All texts in JSON data, keys included."""
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
