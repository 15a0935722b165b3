"""One conversation as the chat template writes it: where its messages stand, and where a reply begins and ends.

What the template writes around messages is compared with what it writes when it is asked for a reply, and when a
conversation ends at a reply. Knows templates and texts; knows nothing of what is wanted of them, of tokens or of media.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property

from ..example import Example, ExampleError, Message
from .marks import Found, Marker, Place, common_start
from .template import ChatTemplate, Turn

STUB = -1
"""Number of a message that is no message of the example."""

KINDS = {"content": "text", "reasoning": "reasoning", "name": "a tool call", "argument": "an argument of a tool call"}


class Reading:
    """
    Attributes:
        text: what the template makes of the conversation.
        generation: runs of it that the template marks by ``{% generation %}``; ``None``: it marks none.
        places: of all pieces of the messages that the text has.
        repeated: places at which it has them once more.
    """

    def __init__(
        self,
        template: ChatTemplate,
        control: re.Pattern[str],
        example: Example,
        cuts: tuple[re.Pattern[str], re.Pattern[str]],
    ) -> None:
        """
        Args:
            control: any special token that only the template writes.
            cuts: as of `Marker`.

        Raises:
            ExampleError: the template refuses the conversation, leaves out a part of it, or looks into its texts so
                that it cannot be told which part of what it writes is whose.
        """
        self._template, self._control = template, control
        self._example, self._messages = example, example.messages
        # a target is made where the assistant would reply
        self._asks = example.target is not None and self._messages[-1].role != "assistant"
        self.text, self.generation = template.marked_generation(template.turns(self._messages), self._asks, example)
        template.check_tools(template.turns(self._messages), self._asks, example)
        speakers = frozenset(i for i, message in enumerate(self._messages) if message.role == "assistant")
        closers = frozenset(text for text in template.looked_for if text.startswith(("</", "[/")))
        self._marker = Marker(self.text, cuts, closers, speakers)
        self._marked = template.turns(self._messages, self._marker)
        found = self._found(self._marked, self._asks)
        if found.text != self.text:
            raise ExampleError(
                "has texts that the chat template looks into, in a way that does not allow to tell which part of the "
                "conversation is whose: give what belongs to the template (tags, control words) as reasoning_content, "
                "tool_calls or messages of role tool, or set another chat.template"
            )
        self.places, self.repeated = found.places, found.repeated
        self._check_left_out()

    # -- places --------------------------------------------------------------------------------------------------------

    def message(self, place: Place) -> int:
        """The number of the message that it belongs to."""
        return self._marker.pieces[place.piece].message

    def of(self, i: int) -> list[Place]:
        """Places of the i-th message."""
        return [place for place in self.places if self.message(place) == i]

    def called(self, i: int) -> str:
        """What errors call the i-th message."""
        return f"message {i + 1} ({self._messages[i].role})"

    def _before(self, i: int) -> Place | None:
        """The last piece of another message before the i-th."""
        first = self.of(i)[0].start
        others = [place for place in self.places if self.message(place) != i and place.start < first]
        return max(others, key=lambda place: place.stop, default=None)

    def _behind(self, i: int) -> Place | None:
        """The first piece of another message behind the i-th.

        Raises:
            ExampleError: another message stands in the middle of it.
        """
        own = self.of(i)
        first, last = own[0].start, max(place.stop for place in own)
        others = [place for place in self.places if self.message(place) != i and place.start >= first]
        behind = min(others, key=lambda place: place.start, default=None)
        if behind is not None and behind.start < last:
            raise self._untold(i)
        return behind

    def _check_left_out(self) -> None:
        found = {place.piece for place in self.places}
        asked = max((i for i, message in enumerate(self._messages) if message.role == "user"), default=-1)
        for number, piece in enumerate(self._marker.pieces):
            if number in found:
                continue
            if piece.kind == "reasoning" and piece.message < asked and self._template.writes_reasoning:
                continue  # many templates write what was thought before the user's last message no more
            raise ExampleError(
                f"has {self.called(piece.message)}, of which the chat template leaves out {KINDS[piece.kind]}: take "
                "it out, or set chat.template to one that writes it"
            )

    # -- where a reply begins ------------------------------------------------------------------------------------------

    def start(self, i: int) -> int:
        """Behind what the template writes when it is asked for the i-th message.

        Raises:
            ExampleError: it cannot be told.
        """
        first, before = self.of(i)[0].start, self._before(i)
        at = 0 if before is None else before.stop
        gap, asked = self.text[at:first], self._asked(i, True)
        if asked is None or asked[0] != (before and before.piece):
            return first - self._within(i, gap)
        shared = common_start(gap, asked[1])
        if shared < min(len(gap), len(asked[1])):  # the template starts a reply otherwise than it asks for one
            unasked = self._asked(i, False)
            if unasked is None or shared <= common_start(gap, unasked[1]):
                raise self._untold(i)
        if self._control.match(gap, shared):  # perhaps a turn is opened here, which was not asked for
            opening = self._opening
            shared += len(opening) if opening and gap.startswith(opening, shared) else 0
        return at + shared

    def _asked(self, i: int, reply: bool) -> tuple[int | None, str] | None:
        """What is written behind the messages before the i-th, with the last piece of them; ``None``: it cannot be."""
        try:
            return self._found(self._marked[:i], reply).behind() if i else None
        except ExampleError:
            return None

    def _within(self, i: int, gap: str) -> int:
        """Number of characters that the template writes into the i-th message before its first word, found out behind
        a message of a user, as the messages before it cannot stand alone."""
        try:
            piece, prompt = self._found(self._stub, True).behind()
            whole = self._found([*self._stub, *self._marked[i:]], self._asks)
        except ExampleError as error:
            raise self._untold(i) from error
        at = next((place.stop for place in whole.places if place.piece == piece), None)
        own = [place.start for place in whole.places if self.message(place) == i]
        if piece is None or self._marker.pieces[piece].message != STUB or at is None or not own:
            raise self._untold(i)
        other = whole.text[at : own[0]]
        header = common_start(other, prompt)
        if not header or not gap.endswith(other[header:]):
            raise self._untold(i)
        return len(other) - header

    @cached_property
    def _opening(self) -> str:
        """What the template writes behind a message of a user to ask for a reply."""
        asked, unasked = (self._found(self._stub, reply).behind()[1] for reply in (True, False))
        return asked[common_start(asked, unasked) :]

    @cached_property
    def _stub(self) -> list[Turn]:
        """A message of a user, to stand before a message that cannot stand alone."""
        mark: Callable[[str, int, str], str] = lambda text, _, kind: self._marker(text, STUB, kind)  # noqa: E731
        return self._template.turns([Message("user", ["a"])], mark)

    # -- where a reply ends --------------------------------------------------------------------------------------------

    def stop(self, i: int) -> tuple[int, bool]:
        """Behind the special token that ends the i-th message, or behind its last word; and whether there is one.

        Raises:
            ExampleError: it cannot be told.
        """
        last, behind = max(place.stop for place in self.of(i)), self._behind(i)
        gap = self.text[last : len(self.text) if behind is None else behind.start]
        tail = gap if behind is None and not self._asks else self._tail(i)
        shared = common_start(gap, tail)
        ends = [match.end() for match in self._control.finditer(gap) if match.end() <= shared]
        if ends:
            return last + ends[-1], True
        one, other = self._control.search(gap), self._control.search(tail)
        if one and other and one.start() == other.start() <= shared:  # the last reply of a conversation ends otherwise
            return last + one.end(), True
        return last + len(gap[:shared].rstrip()), False

    def _tail(self, i: int) -> str:
        """What is written behind the i-th message where it is the last."""
        try:
            piece, tail = self._found(self._marked[: i + 1], False).behind()
        except ExampleError:
            piece, tail = self._found([*self._stub, self._marked[i]], False).behind()
        if piece != max(self.of(i), key=lambda place: place.stop).piece:
            raise self._untold(i)
        return tail

    def _found(self, turns: Sequence[Turn], reply: bool) -> Found:
        return self._marker.read(self._template.render(turns, reply, self._example))

    def _untold(self, i: int) -> ExampleError:
        return ExampleError(
            f"has {self.called(i)}, of which the chat template does not allow to tell where it begins and ends: set "
            "chat.template to one that marks replies by {% generation %}, or learn=False in that message"
        )
