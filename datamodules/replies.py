"""From an example to its text, and the runs of it that the model is to say.

The text is what the chat template makes of the whole conversation. In it a reply runs from where the template, asked
for a reply at this point, would stop, up to the special token that ends it. Templates that mark replies themselves by
``{% generation %}`` are taken at their word. What cannot be told is refused. Knows templates and texts; knows nothing
of tokens or media.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from .example import Example, ExampleError, Image, Message, arguments_of
from .marks import Found, Marker, Place, alternatives, common_start
from .special import SpecialTokens
from .template import ChatTemplate, Turn
from .text import Edit, Run, Text, overlaps

Learn = Literal["all", "last"]

STUB = -1
"""Number of a message that is no message of the example."""

KINDS = {"content": "text", "reasoning": "reasoning", "name": "a tool call", "argument": "an argument of a tool call"}


def plain_text(example: Example, template: ChatTemplate) -> Text:
    """Of an example without a conversation: its parts one after another."""
    pieces: list[str] = []
    given: list[Run] = []
    learnt: list[Run] = []
    at = 0
    for message in example.messages:
        first = at
        for part in message.parts:
            if isinstance(part, str):
                given.append((at, at + len(part)))
                pieces.append(part)
            else:
                pieces.append(template.image_token if isinstance(part, Image) else template.video_token)
            at += len(pieces[-1])
        if message.learn is not False:
            learnt.append((first, at))
    return Text("".join(pieces), given, learnt, whole=True)


@dataclass(frozen=True)
class Replies:
    """Makes the texts of conversations.

    Attributes:
        template: that is applied.
        special: the special tokens of its tokenizer.
        learn: "all" that the assistant says, or the "last": what it says behind the last message of the user.
        end: what is put behind a reply where the template puts no special token; ``None``: such a reply is refused;
            empty: it is learnt without an end.
    """

    template: ChatTemplate
    special: SpecialTokens
    learn: Learn = "all"
    end: str | None = None

    def text(self, example: Example) -> Text:
        """
        Raises:
            ExampleError: the template refuses the conversation, leaves out a part of it, or writes it so that it cannot
                be told what the assistant says.
        """
        self.template.check_variables(example.chat_template_kwargs)
        self.template.check_tools(example)
        self._check_names(example)
        return _Conversation(self, example).text()

    def wanted(self, messages: Sequence[Message]) -> list[bool]:
        """Of each message, whether it is learnt."""
        asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        by_rule = [self.learn == "all" or i > asked for i in range(len(messages))]
        return [
            message.role == "assistant" and (rule if message.learn is None else message.learn)
            for message, rule in zip(messages, by_rule, strict=True)
        ]

    @cached_property
    def cuts(self) -> re.Pattern[str] | None:
        """What the template looks for in texts, except where a control token is in it."""
        found = [text for text in self.template.looked_for if not self.special.pattern.search(text)]
        return re.compile(f"({alternatives(found)})") if found else None

    @cached_property
    def closers(self) -> frozenset[str]:
        return frozenset(text for text in self.template.looked_for if text.startswith(("</", "[/")))

    def _check_names(self, example: Example) -> None:
        """Refuse control tokens where there are no texts to be encoded, but names and schemas."""
        calls = [call for message in example.messages for call in message.tool_calls]
        names = [message.name for message in example.messages if message.name]
        if not (calls or names or example.tools or example.chat_template_kwargs):
            return
        keys = [[name, *_strings(arguments, keys_alone=True)] for name, arguments in map(arguments_of, calls)]
        for text in _strings([names, keys, example.tools, example.chat_template_kwargs]):
            if found := self.special.pattern.search(text):
                raise ExampleError(
                    f"has the special token {found[0]} in a schema, a name or a variable: take it out, or name it in "
                    "allowed_special"
                )


class _Conversation:
    """One example on its way to its text."""

    def __init__(self, replies: Replies, example: Example) -> None:
        self.template, self.special, self.end = replies.template, replies.special, replies.end
        self.example, self.messages = example, example.messages
        self.wanted = replies.wanted(self.messages)
        # a target is made where the assistant would reply
        self.asks = example.target is not None and self.messages[-1].role != "assistant"
        self.whole, self.generation = self.template.marked_generation(
            self.template.turns(self.messages), self.asks, example
        )
        speakers = frozenset(i for i, message in enumerate(self.messages) if message.role == "assistant")
        self.marker = Marker(self.whole, replies.cuts, replies.closers, speakers)
        self.marked = self.template.turns(self.messages, self.marker)
        found = self._found(self.marked, self.asks)
        if found.text != self.whole:
            raise ExampleError(
                "has texts that the chat template looks into, in a way that does not allow to tell which part of the "
                "conversation is whose: give what belongs to the template (tags, control words) as reasoning_content, "
                "tool_calls or messages of role tool, or use another chat_template"
            )
        self.places = found.places

    def text(self) -> Text:
        self._check_left_out()
        spoken = [i for i, wanted in enumerate(self.wanted) if wanted and self._of(i)]
        for i, message in enumerate(self.messages):
            if message.learn and i not in spoken:
                raise ExampleError(f"is to learn {self._called(i)}, which is empty")
        runs = self._generated(spoken) if self.generation is not None else [[(self._start(i), 0)] for i in spoken]
        learnt: list[Run] = []
        edits: list[Edit] = []
        for i, own in zip(spoken, runs, strict=True):
            stop, ended = self._stop(i, own)
            if not ended and self._followed_by(i) != "assistant":
                stop, edit = self._ended(i, stop)
                edits += edit
            learnt += [*own[:-1], (own[-1][0], stop)]
        given = [(place.start, place.stop) for place in self.places]
        return Text(self.whole, given, learnt).edited(edits)

    def _ended(self, i: int, stop: int) -> tuple[int, list[Edit]]:
        """With `end` behind a reply that the template does not end: where it stops, and what is put in."""
        if self.end is None or (self.end and self._followed_by(i) == "tool"):
            raise ExampleError(
                f"has a reply, {self._called(i)}, behind which the chat template puts no special token: a model that "
                "learns it does not learn to stop. Give a chat_template that ends replies; or say by end_of_reply what "
                f"is to end them, such as {self.special.tokenizer.eos_token!r} (not for tool calls); end_of_reply='' "
                "learns them without an end"
            )
        if self.whole.startswith(self.end, stop):
            return stop + len(self.end), []
        return stop, [(stop, stop, self.end)]

    def _followed_by(self, i: int) -> str:
        """The role of the next message."""
        return self.messages[i + 1].role if i + 1 < len(self.messages) else ""

    # -- where a reply begins and ends ---------------------------------------------------------------------------------

    def _start(self, i: int) -> int:
        """Behind what the template writes when it is asked for this reply."""
        first, before = self._of(i)[0].start, self._before(i)
        at = 0 if before is None else before.stop
        gap, asked = self.whole[at:first], self._asked(i, True)
        if asked is None or asked[0] != (before and before.piece):
            return first - self._within(i, gap)
        shared = common_start(gap, asked[1])
        if shared < min(len(gap), len(asked[1])):  # the template starts a reply otherwise than it asks for one
            unasked = self._asked(i, False)
            if unasked is None or shared <= common_start(gap, unasked[1]):
                raise self._untold(i)
        if self.special.pattern.match(gap, shared):  # perhaps a turn is opened here, which was not asked for
            opening = self._opening
            shared += len(opening) if opening and gap.startswith(opening, shared) else 0
        return at + shared

    @cached_property
    def _opening(self) -> str:
        """What the template writes behind a message of a user to ask for a reply."""
        asked, unasked = (self._found(self._stub, reply).behind()[1] for reply in (True, False))
        return asked[common_start(asked, unasked) :]

    def _asked(self, i: int, reply: bool) -> tuple[int | None, str] | None:
        """What is written behind the messages before the i-th, with the last piece of them; ``None``: it cannot be."""
        try:
            return self._found(self.marked[:i], reply).behind() if i else None
        except ExampleError:
            return None

    def _within(self, i: int, gap: str) -> int:
        """Number of characters that the template writes into the i-th reply before its first word, found out behind a
        message of a user, as nothing can stand alone before it."""
        try:
            piece, prompt = self._found(self._stub, True).behind()
            whole = self._found([*self._stub, *self.marked[i:]], self.asks)
        except ExampleError as error:
            raise self._untold(i) from error
        at = next((place.stop for place in whole.places if place.piece == piece), None)
        own = [place.start for place in whole.places if self._message(place) == i]
        if piece is None or self.marker.pieces[piece].message != STUB or at is None or not own:
            raise self._untold(i)
        other = whole.text[at : own[0]]
        header = common_start(other, prompt)
        if not header or not gap.endswith(other[header:]):
            raise self._untold(i)
        return len(other) - header

    @cached_property
    def _stub(self) -> list[Turn]:
        """A message of a user, to stand before a message that cannot stand alone."""
        return self.template.turns([Message("user", ["a"])], lambda text, _, kind: self.marker(text, STUB, kind))

    def _stop(self, i: int, runs: Sequence[Run]) -> tuple[int, bool]:
        """Behind what ends the i-th reply, and whether a control token does.

        Args:
            runs: what the template marks as the reply, if it marks any.
        """
        last, behind = max(place.stop for place in self._of(i)), self._behind(i)
        gap = self.whole[last : len(self.whole) if behind is None else behind.start]
        if self.generation is not None:
            marked = runs[-1][1]
            ended = self.special.pattern.search(self.whole, last, marked) is not None
            return (marked, True) if ended or self._followed_by(i) == "assistant" else (last, False)
        tail = self._tail(i, gap, behind is None)
        shared = common_start(gap, tail)
        ends = [match.end() for match in self.special.pattern.finditer(gap) if match.end() <= shared]
        if ends:
            return last + ends[-1], True
        one, other = self.special.pattern.search(gap), self.special.pattern.search(tail)
        if one and other and one.start() == other.start() <= shared:  # the last reply of a conversation ends otherwise
            return last + one.end(), True
        return last + len(gap[:shared].rstrip()), False

    def _tail(self, i: int, gap: str, is_last: bool) -> str:
        """What is written behind the i-th message where it is the last."""
        if is_last and not self.asks:
            return gap
        try:
            piece, tail = self._found(self.marked[: i + 1], False).behind()
        except ExampleError:
            piece, tail = self._found([*self._stub, self.marked[i]], False).behind()
        if piece != max(self._of(i), key=lambda place: place.stop).piece:
            raise self._untold(i)
        return tail

    def _generated(self, spoken: Sequence[int]) -> list[list[Run]]:
        """What the template marks as each of these messages."""
        assert self.generation is not None
        runs: dict[int, list[Run]] = {i: [] for i in spoken}
        for start, stop in self.generation:
            within = {self._message(p) for p in self.places if p.start < stop and start < p.stop}
            before = [p for p in self.places if p.stop <= start]
            if not within and before:  # what ends a reply may be marked by itself
                within = {self._message(max(before, key=lambda place: place.stop))}
            if len(within) > 1 and len({i in spoken for i in within}) > 1:
                raise ExampleError(
                    "has messages of which some are learnt and some are not, and which the chat template marks together"
                )
            if owner := within & runs.keys():
                runs[max(owner)].append((start, stop))
        for i in spoken:
            if not any(overlaps([(place.start, place.stop)], *run) for place in self._of(i) for run in runs[i]):
                raise ExampleError(f"has {self._called(i)}, which the chat template does not mark as generated")
        return [runs[i] for i in spoken]

    # -- places --------------------------------------------------------------------------------------------------------

    def _found(self, turns: Sequence[Turn], reply: bool) -> Found:
        return self.marker.read(self.template.render(turns, reply, self.example))

    def _message(self, place: Place) -> int:
        return self.marker.pieces[place.piece].message

    def _of(self, i: int) -> list[Place]:
        return [place for place in self.places if self._message(place) == i]

    def _before(self, i: int) -> Place | None:
        """The last piece of another message before the i-th."""
        first = self._of(i)[0].start
        others = [place for place in self.places if self._message(place) != i and place.start < first]
        return max(others, key=lambda place: place.stop, default=None)

    def _behind(self, i: int) -> Place | None:
        """The first piece of another message behind the i-th.

        Raises:
            ExampleError: another message stands in the middle of it.
        """
        own = self._of(i)
        first, last = own[0].start, max(place.stop for place in own)
        others = [place for place in self.places if self._message(place) != i and place.start >= first]
        behind = min(others, key=lambda place: place.start, default=None)
        if behind is not None and behind.start < last:
            raise self._untold(i)
        return behind

    def _check_left_out(self) -> None:
        found = {place.piece for place in self.places}
        asked = max((i for i, message in enumerate(self.messages) if message.role == "user"), default=-1)
        for number, piece in enumerate(self.marker.pieces):
            if number in found or piece.message == STUB:
                continue
            if piece.kind == "reasoning" and piece.message < asked and self.template.writes_reasoning:
                continue  # many templates write what was thought before the user's last message no more
            raise ExampleError(
                f"has {self._called(piece.message)}, of which the chat template leaves out {KINDS[piece.kind]}: take "
                "it out, or give a chat_template that writes it"
            )

    def _called(self, i: int) -> str:
        return f"message {i + 1} ({self.messages[i].role})"

    def _untold(self, i: int) -> ExampleError:
        return ExampleError(
            f"has {self._called(i)}, of which the chat template does not allow to tell where it begins and ends: give "
            "a chat_template that marks replies by {% generation %}, or learn=False in that message"
        )


def _strings(value: object, keys_alone: bool = False) -> Iterator[str]:
    """All texts in JSON data, or those that are keys."""
    if isinstance(value, str) and not keys_alone:
        yield value
    elif isinstance(value, Mapping):
        yield from map(str, value)
        for item in value.values():
            yield from _strings(item, keys_alone)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, keys_alone)
