"""From an example to its text, and the runs of it that the model is to say.

The text is what the chat template makes of the whole conversation. In it a reply runs from where the template, asked
for a reply at this point, would stop, up to the special token that ends it. Templates that mark replies themselves by
``{% generation %}`` are taken at their word. What cannot be told is refused. Knows templates and texts; knows nothing
of tokens or media.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..example import Example, ExampleError, Image, Message, arguments_of
from ..options import Learn
from .marks import alternatives
from .reading import Reading
from .special import SpecialTokens
from .template import ChatTemplate
from .text import Edit, Run, Text, keys_in, overlaps, strings_in


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
        if reason := self.template.refused_variable(example.chat_template_kwargs):
            raise ExampleError(f"has chat_template_kwargs with {reason}")
        self._check_names(example)
        messages = example.messages
        reading = Reading(self.template, self.special.written, example, self._cuts)
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
            behind = messages[i + 1].role if i + 1 < len(messages) else None
            if not ended and behind != "assistant":  # which would go on speaking
                self._check_end(reading.called(i), behind)
                if self.end and not reading.text.startswith(self.end, stop):
                    edits.append((stop, stop, self.end))
                elif self.end:
                    stop += len(self.end)
            learnt += [*own[:-1], (own[-1][0], stop)]
        given = sorted((place.start, place.stop) for place in (*reading.places, *reading.repeated))
        return Text(reading.text, given, learnt).edited(edits)

    def wanted(self, messages: Sequence[Message]) -> list[bool]:
        """Of each message, whether it is learnt."""
        asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        by_rule = [self.learn == "all" or i > asked for i in range(len(messages))]
        return [
            message.role == "assistant" and (rule if message.learn is None else message.learn)
            for message, rule in zip(messages, by_rule, strict=True)
        ]

    @cached_property
    def _cuts(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """What the template looks for in texts, except where a control token is in it."""
        unsafe = (self.special.unspoken, self.special.pattern)
        said, other = ([text for text in self.template.looked_for if not pattern.search(text)] for pattern in unsafe)
        return re.compile(f"({alternatives(said)})"), re.compile(f"({alternatives(other)})")

    def _check_names(self, example: Example) -> None:
        """Refuse control tokens where there are no texts to be encoded, but names and schemas."""
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

    def _check_end(self, called: str, behind: str | None) -> None:
        """Refuse a reply without an end, unless it is said what is to end it."""
        if self.end is None or (self.end and behind == "tool"):
            token = self.special.tokenizer.eos_token
            such = f", such as {token!r}" if token else ""
            raise ExampleError(
                f"has a reply, {called}, behind which the chat template puts no special token: a model that learns it "
                "does not learn to stop. Set chat.template to one that ends replies, or set chat.end_of_reply to a "
                f"token that ends them{such} (not for tool calls), or to '' to learn them without an end"
            )

    def _generated_stop(self, reading: Reading, i: int, runs: Sequence[Run]) -> tuple[int, bool]:
        """Where what the template marks as the i-th message ends, and whether by a control token; if not, behind its
        last word."""
        last, stop = max(place.stop for place in reading.of(i)), runs[-1][1]
        ended = self.special.written.search(reading.text, last, stop) is not None
        return (stop, True) if ended else (min(last, stop), False)


def _generated(reading: Reading, generation: Sequence[Run], spoken: Sequence[int]) -> list[list[Run]]:
    """What the template marks as each of these messages."""
    runs: dict[int, list[Run]] = {i: [] for i in spoken}
    for start, stop in generation:
        within = {reading.message(p) for p in reading.places if p.start < stop and start < p.stop}
        before = [p for p in reading.places if p.stop <= start]
        if not within and before:  # what ends a reply may be marked by itself
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
