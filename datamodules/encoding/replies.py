"""Makes the text of an example, and finds the runs of it that the model learns.

The text is the chat template's output for the whole conversation. A reply begins where the template would stop if it
were asked for a reply at this point, and ends with the special token that ends it (see reading.py). If the template
marks replies itself by ``{% generation %}``, its marks are used. If neither is clear, the example is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import ExampleError
from ..example import Example, Message, arguments_of
from ..options import Learn
from .marks import alternatives
from .reading import Reading
from .special import SpecialTokens
from .template import PROBE, ChatTemplate
from .text import Edit, Run, Text, keys_in, overlaps, strings_in


def plain_text(example: Example, template: ChatTemplate) -> Text:
    """The text of an example without a template: its parts one after another."""
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
                pieces.append(template.token(part))
            at += len(pieces[-1])
        if message.learn is not False:
            learnt.append((first, at))
    return Text("".join(pieces), given, learnt, whole=True)


@dataclass(frozen=True)
class Replies:
    """Makes the texts of conversations.

    Attributes:
        template: the chat template.
        special: the special tokens of its tokenizer.
        learn, end: `learn` and `end_of_reply` of `ChatOptions`.
    """

    template: ChatTemplate
    special: SpecialTokens
    learn: Learn = "all"
    end: str | None = None

    def text(self, example: Example) -> Text:
        """The text of a conversation.

        Raises:
            ExampleError: the template refuses the conversation, leaves out a part of it, or writes it so that it is not
                known where replies begin and end.
        """
        return self._text(example, self._read(example))

    def _text(self, example: Example, reading: Reading) -> Text:
        messages = example.messages
        spoken = [i for i, wanted in enumerate(self.wanted(messages)) if wanted and reading.of(i)]
        for i, message in enumerate(messages):
            if message.learn and i not in spoken:
                raise ExampleError(f"is to learn {reading.called(i)}, which is empty")
        if reading.generation is None:
            runs = [[(reading.start(i), 0)] for i in spoken]
            stops = [reading.stop(i) for i in spoken]
        else:
            runs = _generated(reading, reading.generation, spoken)
            stops = [self._generated_stop(reading, i, own) for i, own in zip(spoken, runs, strict=True)]
        learnt: list[Run] = []
        edits: list[Edit] = []
        for i, own, (stop, ended) in zip(spoken, runs, stops, strict=True):
            next_role = messages[i + 1].role if i + 1 < len(messages) else None
            if not ended and next_role != "assistant":  # two replies in a row are one to the model
                self._check_end(reading.called(i), next_role)
                if self.end and not reading.text.startswith(self.end, stop):
                    edits.append((stop, stop, self.end))
                elif self.end:
                    stop += len(self.end)
            learnt += [*own[:-1], (own[-1][0], stop)]
        return Text(reading.text, _given(reading), learnt).edited(edits)

    def prompt(self, example: Example) -> Text:
        """The text of a conversation up to where the assistant is to reply.

        Raises:
            ExampleError: the assistant has spoken last, or see `text`.
        """
        if example.messages[-1].role == "assistant":
            raise ExampleError("ends with a message of the assistant, so there is nothing to reply to")
        return replace(self._text(example, self._read(example, asks=True)), learnt=[])

    def _read(self, example: Example, asks: bool = False) -> Reading:
        if reason := self.template.refused_variable(example.chat_template_kwargs):
            raise ExampleError(f"has chat_template_kwargs with {reason}")
        self._check_names(example)
        return Reading(self.template, self.special.written, example, self._cuts, asks)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end a reply: the tokenizer's end token, and what the template or `end` puts after one."""
        tokenizer = self.special.tokenizer
        found = {tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids([self.end]) if self.end else ())}
        _, _, after = self.template.ordinary_reply.rpartition(PROBE)
        if first := self.special.written.search(after):
            found.add(tokenizer.convert_tokens_to_ids(first[0]))
        return frozenset(found - {None, tokenizer.unk_token_id})

    def wanted(self, messages: Sequence[Message]) -> list[bool]:
        """For each message whether it is learnt."""
        last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        by_option = [self.learn == "all" or i > last_user for i in range(len(messages))]
        return [
            message.role == "assistant" and (option if message.learn is None else message.learn)
            for message, option in zip(messages, by_option, strict=True)
        ]

    @cached_property
    def _cuts(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """The strings that the template looks for in texts, without those that contain a control token."""
        unsafe = (self.special.unspoken, self.special.pattern)
        in_replies, in_others = (
            [text for text in self.template.looked_for if not pattern.search(text)] for pattern in unsafe
        )
        return re.compile(f"({alternatives(in_replies)})"), re.compile(f"({alternatives(in_others)})")

    def _check_names(self, example: Example) -> None:
        """
        Raises:
            ExampleError: a name or a schema has a control token. It would become a token, since only texts are encoded
                with care.
        """
        names: list[Any] = [example.tools, example.chat_template_kwargs]
        for message in example.messages:
            names += [message.name, message.tool_call_id]
            for call in message.tool_calls:
                function = {key: value for key, value in call["function"].items() if key != "arguments"}
                names += [{**call, "function": function}, *keys_in(arguments_of(call)[1])]
        for text in strings_in(names):
            if found := self.special.pattern.search(text):
                raise ExampleError(
                    f"has the special token {found[0]} in a schema, a name or a variable: take it out, or name it in "
                    "chat.allowed_special"
                )

    def _check_end(self, called: str, next_role: str | None) -> None:
        """
        Raises:
            ExampleError: a reply has no end, and the options do not say how it ends.
        """
        if self.end is None or (self.end and next_role == "tool"):
            token = self.special.tokenizer.eos_token
            such = f", such as {token!r}" if token else ""
            raise ExampleError(
                f"has a reply, {called}, after which the chat template puts no special token: a model that learns it "
                "does not learn to stop. Set chat.template to one that ends replies, or set chat.end_of_reply to a "
                f"token that ends them{such} (not for tool calls), or to '' to learn them without an end"
            )

    def _generated_stop(self, reading: Reading, i: int, runs: Sequence[Run]) -> tuple[int, bool]:
        """The index at which the runs that the template marks as the i-th message end, and whether a control token ends
        them. Without one, the index after its last word."""
        last, stop = max(place.stop for place in reading.of(i)), runs[-1][1]
        ended = self.special.written.search(reading.text, last, stop) is not None
        return (stop, True) if ended else (min(last, stop), False)


def _given(reading: Reading) -> list[Run]:
    """The runs of the text that come from messages."""
    return sorted((place.start, place.stop) for place in (*reading.places, *reading.repeated))


def _generated(reading: Reading, generation: Sequence[Run], spoken: Sequence[int]) -> list[list[Run]]:
    """For each of these messages the runs that the template marks as it.

    Raises:
        ExampleError: the template marks a message together with one that is not learnt, or does not mark it.
    """
    runs: dict[int, list[Run]] = {i: [] for i in spoken}
    for start, stop in generation:
        within = {reading.message(p) for p in reading.places if p.start < stop and start < p.stop}
        before = [p for p in reading.places if p.stop <= start]
        if not within and before:  # the end of a reply may be a mark of its own
            within = {reading.message(max(before, key=lambda place: place.stop))}
        if len({i in runs for i in within}) > 1:
            raise ExampleError(
                "has messages of which some are learnt and some are not, and which the chat template marks together"
            )
        if within & runs.keys():
            runs[max(within)].append((start, stop))
    for i in spoken:
        if not any(overlaps([(place.start, place.stop)], *run) for place in reading.of(i) for run in runs[i]):
            raise ExampleError(f"has {reading.called(i)}, which the chat template does not mark as generated")
    return [runs[i] for i in spoken]
