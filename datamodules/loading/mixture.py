"""Draws examples from several streams by their weights, starting at any position."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ExampleError, SourceError, reason_of
from ..example import Example
from ..sources.stream import Stream
from .agreed_loader import Position

Drawn = tuple[int, int, Example | ExampleError]
"""The number of a stream, how many examples of it were drawn before, and the example."""


class Mixture:
    """Draws from several streams by their weights. A stream that has ended is read again.

    Attributes:
        streams: the state of each stream, as in `Position`.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], position: Position) -> None:
        self._from = streams
        self._shares = [weight / sum(weights) for weight in weights]
        self._readers: list[Iterator[tuple[Example | ExampleError, Any]] | None] = [None] * len(streams)
        self.streams: list[dict[str, Any]] = list(position["streams"])
        self._before = self.streams
        self._last: Drawn | None = None
        self._is_put_back = False

    def draw(self) -> Drawn:
        """The next example, or the last one if it was put back.

        Raises:
            SourceError: a stream is empty, or reading it failed.
        """
        if self._is_put_back:
            assert self._last is not None
            self._is_put_back, self.streams, self._before = False, self._before, self.streams
            return self._last
        drawn = [stream["drawn"] for stream in self.streams]
        # the stream that is furthest behind its share: no random numbers, and the shares hold at any moment
        behind = [share * (sum(drawn) + 1) - number for share, number in zip(self._shares, drawn, strict=True)]
        which = behind.index(max(behind))
        try:
            repeat, place, example = self._next(which)
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(f"{self._from[which].name} cannot be read: {reason_of(error)}") from error
        self._before = self.streams
        self.streams = list(self.streams)
        self.streams[which] = {**self.streams[which], "repeat": repeat, "place": place, "drawn": drawn[which] + 1}
        self._last = (which, drawn[which], example)
        return self._last

    def put_back(self) -> None:
        """Let `draw` return the last example once more."""
        self._is_put_back, self.streams, self._before = True, self._before, self.streams

    def _next(self, which: int) -> tuple[int, Any, Example | ExampleError]:
        """The next example of a stream, with the repeat that it belongs to and the place after it."""
        state = self.streams[which]
        for repeat, place in ((state["repeat"], state["place"]), (state["repeat"] + 1, None)):
            reader = self._readers[which]
            if reader is None:
                reader = self._readers[which] = self._from[which].read(repeat, place)
            for example, place_after in reader:
                return repeat, place_after, example
            self._readers[which] = None
        raise SourceError(f"{self._from[which].name} has no examples, or fewer than mixture.stream_parts")
