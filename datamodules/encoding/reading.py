"""One conversation as the chat template writes it: the places of its messages, and where each reply begins and ends.

A template does not say where a reply begins and ends, so this is found by rendering parts of the conversation:

- A reply begins after what the template writes when it is asked for a reply (`add_generation_prompt`) at that point,
  since that is where the model will have to continue.
- It ends with the last special token that the template also writes if the conversation ends with this reply. What
  follows belongs to the next message.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from ..errors import ExampleError
from ..example import Example, Message
from .marks import Found, Marker, Place, common_start
from .template import ChatTemplate, Turn

STUB = -1
"""The number of the message in `_stub`, which is no message of the example."""

KINDS = {"content": "text", "reasoning": "reasoning", "name": "a tool call", "argument": "an argument of a tool call"}


def _start(place: Place) -> int:
    return place.start


class Reading:
    """
    Attributes:
        text: the template's output for the conversation.
        generation: the runs of it that the template marks by ``{% generation %}``; ``None``: it marks none.
        places: the first place of each piece of the messages that the text has.
        repeated: further places of these pieces.
    """

    def __init__(
        self,
        template: ChatTemplate,
        control: re.Pattern[str],
        example: Example,
        cuts: tuple[re.Pattern[str], re.Pattern[str]],
        asks: bool = False,
    ) -> None:
        """
        Args:
            asks: whether the text ends with what asks the assistant for a reply. It always does if the example has a
                target, which is then the reply.
            control: matches any special token that the template may write.
            cuts: see `Marker`.

        Raises:
            ExampleError: the template refuses the conversation, leaves out a part of it, or inspects its texts so that
                the places of messages are not known.
        """
        self._template, self._control = template, control
        self._example, self._messages = example, example.messages
        self._asks = asks or (example.target is not None and self._messages[-1].role != "assistant")
        self.text, self.generation = template.marked_generation(template.turns(self._messages), self._asks, example)
        template.check_tools(template.turns(self._messages), self._asks, example)
        speakers = frozenset(i for i, message in enumerate(self._messages) if message.role == "assistant")
        closers = frozenset(text for text in template.looked_for if text.startswith(("</", "[/")))
        self._marker = Marker(self.text, cuts, closers, speakers)
        self._marked = template.turns(self._messages, self._marker)
        found = self._found(self._marked, self._asks)
        if found.text != self.text:
            raise ExampleError(
                "has texts that the chat template inspects, so that it is not known which part of its output is from "
                "which message: give what belongs to the template (tags, control words) as reasoning_content, "
                "tool_calls or messages of role tool, or set another chat.template"
            )
        self.places, self.repeated = found.places, found.repeated
        self._known: dict[object, Any] = {}
        self._check_left_out()

    # -- places --------------------------------------------------------------------------------------------------------

    def message(self, place: Place) -> int:
        """The number of the message that a place belongs to."""
        return self._marker.pieces[place.piece].message

    def of(self, i: int) -> list[Place]:
        """The places of the i-th message."""
        return self._by_message.get(i, [])

    @cached_property
    def _by_message(self) -> dict[int, list[Place]]:
        found: dict[int, list[Place]] = {}
        for place in self.places:
            found.setdefault(self.message(place), []).append(place)
        return found

    @cached_property
    def _in_order(self) -> list[Place]:
        """All places, which do not overlap, in the order of the text."""
        return sorted(self.places, key=_start)

    def called(self, i: int) -> str:
        """What errors call the i-th message."""
        return f"message {i + 1} ({self._messages[i].role})"

    def _before(self, i: int) -> Place | None:
        """The last piece of another message before the i-th."""
        number = bisect_left(self._in_order, self.of(i)[0].start, key=_start) - 1
        while number >= 0 and self.message(self._in_order[number]) == i:
            number -= 1
        return self._in_order[number] if number >= 0 else None

    def _after(self, i: int) -> Place | None:
        """The first piece of another message after the i-th.

        Raises:
            ExampleError: the template writes another message in the middle of it.
        """
        own = self.of(i)
        first, last = own[0].start, max(place.stop for place in own)
        number = bisect_left(self._in_order, first, key=_start)
        while number < len(self._in_order) and self.message(self._in_order[number]) == i:
            number += 1
        after = self._in_order[number] if number < len(self._in_order) else None
        if after is not None and after.start < last:
            raise self._unclear(i)
        return after

    def _check_left_out(self) -> None:
        found = {place.piece for place in self.places}
        asked = max((i for i, message in enumerate(self._messages) if message.role == "user"), default=-1)
        for number, piece in enumerate(self._marker.pieces):
            if number in found:
                continue
            if piece.kind == "reasoning" and piece.message < asked and self._template.writes_reasoning:
                continue  # many templates leave out reasoning before the last message of the user
            raise ExampleError(
                f"has {self.called(piece.message)}, of which the chat template leaves out {KINDS[piece.kind]}: take "
                "it out, or set chat.template to one that writes it"
            )

    # -- where a reply begins ------------------------------------------------------------------------------------------

    def start(self, i: int) -> int:
        """The index at which the i-th message begins: after what the template writes when it is asked for it.

        Raises:
            ExampleError: it is not known.
        """
        first, before = self.of(i)[0].start, self._before(i)
        at = 0 if before is None else before.stop
        gap = self.text[at:first]
        key = ("start", gap, before is None, self._form(i - 1), self._form(i))
        if key not in self._known:
            self._known[key] = self._start_in(i, gap, before)
        return at + self._known[key]

    def _start_in(self, i: int, gap: str, before: Place | None) -> int:
        """Where the i-th message begins in the gap between the message before and its first piece.

        It is found by writing all messages before, and so only for the first of the replies that are alike: those with
        the same text before them, after a message of the same form.
        """
        asked = self._asked(i, True)
        if asked is None or asked[0] != (before and before.piece):
            return len(gap) - self._within(i, gap)
        shared = common_start(gap, asked[1])
        if shared < min(len(gap), len(asked[1])):  # a reply starts differently from the prompt that asks for it
            unasked = self._asked(i, False)
            if unasked is None or shared <= common_start(gap, unasked[1]):
                raise self._unclear(i)
        if self._control.match(gap, shared):  # the template may open another turn here, which it does not ask for
            opening = self._opening
            shared += len(opening) if opening and gap.startswith(opening, shared) else 0
        return shared

    def _form(self, i: int) -> object:
        """What a template may go by in how it writes a message, besides its texts."""
        if not 0 <= i < len(self._messages):
            return None
        message = self._messages[i]
        parts = tuple(dict.fromkeys(type(part) for part in message.parts))
        return message.role, parts, message.reasoning_content is None, len(message.tool_calls) > 0

    def _asked(self, i: int, reply: bool) -> tuple[int | None, str] | None:
        """What the template writes after the messages before the i-th, with the number of their last piece; ``None``:
        it cannot write these messages alone.

        Args:
            reply: whether it is asked for a reply.
        """
        try:
            return self._found(self._marked[:i], reply).after_last() if i else None
        except ExampleError:
            return None

    def _within(self, i: int, gap: str) -> int:
        """How many characters at the end of a gap belong to the i-th message, before its first piece.

        It is used if the template cannot write the messages before the i-th alone: they are replaced by `_stub`.

        Args:
            gap: the text between the message before and the first piece.
        """
        try:
            piece, prompt = self._found(self._stub, True).after_last()
            whole = self._found([*self._stub, *self._marked[i:]], self._asks)
        except ExampleError as error:
            raise self._unclear(i) from error
        at = next((place.stop for place in whole.places if place.piece == piece), None)
        own = [place.start for place in whole.places if self.message(place) == i]
        if piece is None or self._marker.pieces[piece].message != STUB or at is None or not own:
            raise self._unclear(i)
        other = whole.text[at : own[0]]
        header = common_start(other, prompt)
        if not header or not gap.endswith(other[header:]):
            raise self._unclear(i)
        return len(other) - header

    @cached_property
    def _opening(self) -> str:
        """What the template writes after a message of the user to ask for a reply."""
        asked, unasked = (self._found(self._stub, reply).after_last()[1] for reply in (True, False))
        return asked[common_start(asked, unasked) :]

    @cached_property
    def _stub(self) -> list[Turn]:
        """A message of the user, which is put before a message that the template cannot write alone."""
        mark: Callable[[str, int, str], str] = lambda text, _, kind: self._marker(text, STUB, kind)  # noqa: E731
        return self._template.turns([Message("user", ["a"])], mark)

    # -- where a reply ends --------------------------------------------------------------------------------------------

    def stop(self, i: int) -> tuple[int, bool]:
        """The index after the special token that ends the i-th message, and whether there is such a token. Without one,
        the index after its last word.

        Raises:
            ExampleError: it is not known.
        """
        last, after = max(place.stop for place in self.of(i)), self._after(i)
        gap = self.text[last : len(self.text) if after is None else after.start]
        key = ("stop", gap, after is None, self._form(i), self._form(i + 1))
        if key not in self._known:
            self._known[key] = self._stop_in(i, gap, after)
        length, ended = self._known[key]
        return last + length, ended

    def _stop_in(self, i: int, gap: str, after: Place | None) -> tuple[int, bool]:
        """Where the i-th message ends in the gap after its last word, and whether a special token ends it; found as
        `_start_in`."""
        tail = gap if after is None and not self._asks else self._tail(i)
        shared = common_start(gap, tail)
        ends = [match.end() for match in self._control.finditer(gap) if match.end() <= shared]
        if ends:
            return ends[-1], True
        one, other = self._control.search(gap), self._control.search(tail)
        if (
            one and other and one.start() == other.start() <= shared
        ):  # the last reply of a conversation ends with another token
            return one.end(), True
        return len(gap[:shared].rstrip()), False

    def _tail(self, i: int) -> str:
        """What the template writes after the i-th message if it is the last."""
        try:
            piece, tail = self._found(self._marked[: i + 1], False).after_last()
        except ExampleError:
            piece, tail = self._found([*self._stub, self._marked[i]], False).after_last()
        if piece != max(self.of(i), key=lambda place: place.stop).piece:
            raise self._unclear(i)
        return tail

    def _found(self, turns: Sequence[Turn], reply: bool) -> Found:
        return self._marker.read(self._template.render(turns, reply, self._example))

    def _unclear(self, i: int) -> ExampleError:
        return ExampleError(
            f"has {self.called(i)}, and the chat template does not show where this message begins and ends: set "
            "chat.template to one that marks replies by {% generation %}, or learn=False in that message"
        )
