"""Special tokens: those that the template writes become tokens, those in texts of the example ordinary characters.

Otherwise a user's text that contains ``<|im_end|>`` would end its turn.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from ..errors import ExampleError, reason_of
from ..options import InText
from .marks import alternatives
from .template import ChatTemplate
from .text import Run, Text

TAG = re.compile(r"[^\w\s]")
"""A character that tokens which structure a conversation have, unlike words that were added to a vocabulary."""

Token = tuple[int, int, int]
"""The id of a token, and the start and stop of the run of characters that it stands for."""


@dataclass(frozen=True)
class SpecialTokens:
    """Encodes texts so that special tokens in texts of the example do not become tokens.

    Attributes:
        tokenizer: a fast tokenizer.
        control: the contents of the tokens that only the template may write.
        spoken: those of them that may be in the assistant's texts, since the template looks for them there, such as
            ``<think>``.
        allowed: the contents of special tokens that texts may have as tokens, too.
        in_text: "text" encodes a control token in a text as ordinary characters; "refuse" makes it an error.
    """

    tokenizer: Any
    control: frozenset[str]
    spoken: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()
    in_text: InText = "text"

    @classmethod
    def of(
        cls, template: ChatTemplate, placeholders: Sequence[str], in_text: InText, allowed: Sequence[str]
    ) -> "SpecialTokens":
        """Find the control tokens: the special tokens of the tokenizer, those that it lists as `chat_control_tokens`,
        and those that the template writes around messages, even if the tokenizer does not call them special.

        Args:
            placeholders: tokens that stand for media.
            allowed: tokens that texts may contain.

        Raises:
            ValueError: an allowed token is no special token, or stands for media.
        """
        tokenizer = template.tokenizer
        added: dict[str, bool] = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        unknown = [token for token in allowed if token not in added or token in placeholders]
        if unknown:
            raise ValueError(
                f"chat.allowed_special={unknown}: name special tokens of the tokenizer, and none that stand for media"
            )
        control = {token for token, special in added.items() if special} | ({*placeholders} & added.keys())
        control |= {*(tokenizer.chat_control_tokens or ())}
        control |= {token for token in added if TAG.search(token) and token in template.ordinary} - _pairs(added)
        control -= {*allowed}
        spoken = control & {*template.looked_for} - {*tokenizer.special_tokens_map.values(), *placeholders}
        return cls(tokenizer, frozenset(control), frozenset(spoken), frozenset(allowed), in_text)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches any control token."""
        return re.compile(alternatives([*self.control]))

    @cached_property
    def written(self) -> re.Pattern[str]:
        """Matches any special token that the template may write, including allowed ones."""
        return re.compile(alternatives([*self.control, *self.allowed]))

    @cached_property
    def unspoken(self) -> re.Pattern[str]:
        """Matches any control token that is not in `spoken`."""
        return re.compile(alternatives([*self.control - self.spoken]))

    @cached_property
    def _ids(self) -> frozenset[int]:
        """The ids of the control tokens."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(token) for token in self.control)

    def encode(self, text: Text, own: bool) -> list[Token]:
        """The tokens of a text.

        Args:
            own: whether the tokenizer adds its own special tokens around the text.

        Raises:
            ExampleError: the text cannot be tokenized; or a part that comes from the example has a control token, and
                `in_text` is "refuse".
        """
        tokens = self._encoded(text.text, own)
        ordinary = self._control_tokens_in_given(tokens, text)
        if not ordinary:
            return tokens
        if self.in_text == "refuse":
            found = dict.fromkeys(text.text[start:stop] for start, stop in ordinary)
            raise ExampleError(
                f"has a text with the special tokens {', '.join(found)}: take them out, name them in "
                'chat.allowed_special, or set chat.special_tokens to "text", which encodes them as ordinary characters'
            )
        added = [token for token in tokens if token[1] == token[2]] if own else []
        front = sum(1 for _ in takewhile(lambda token: token[1] == token[2], tokens)) if own else 0
        tokens = [*added[:front], *self._in_pieces(text.text, ordinary), *added[front:]]
        if self._control_tokens_in_given(tokens, text):
            raise ExampleError("has a text that the tokenizer turns into a special token, however it is split")
        return tokens

    def _control_tokens_in_given(self, tokens: Sequence[Token], text: Text) -> list[Run]:
        """The runs of text from the example of which the tokenizer has made control tokens."""
        found: list[Run] = []
        for token, start, stop in tokens:
            if token in self._ids and text.is_given(start, stop):
                match = self.pattern.search(text.text, start, stop)  # a token may include the blanks around it
                run = (start, stop) if match is None else match.span()
                if text.is_given(*run):
                    found.append(run)
        return found

    def _in_pieces(self, text: str, ordinary: Sequence[Run]) -> list[Token]:
        """The tokens of a text in which some runs are encoded without special tokens. The text is split around each
        run, as the library does with ``sanitize_control_tokens=True``."""
        tokens: list[Token] = []
        at = 0
        for start, stop in (*ordinary, (len(text), len(text))):
            piece = self._continued(text[at:start]) if at else self._encoded(text[:start], False)
            tokens += [(token, at + a, at + b) for token, a, b in piece]
            tokens += [(token, start, stop) for token in self._spelled(text[start:stop])]
            at = stop
        return tokens

    def _encoded(self, text: str, own: bool) -> list[Token]:
        try:
            encoded = self.tokenizer(text, add_special_tokens=own, return_offsets_mapping=True)
        except Exception as error:  # such as lone surrogates, which no tokenizer can encode
            raise ExampleError(f"has a text that cannot be tokenized: {reason_of(error)}") from error
        return [(token, *run) for token, run in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    def _continued(self, text: str) -> list[Token]:
        """The tokens of a text that is not at the start. It is encoded after a line break, whose tokens are removed:
        some tokenizers put a blank before the start of a text."""
        if not text:
            return []
        newline = self._encoded("\n", False)
        tokens = self._encoded("\n" + text, False)
        if [token for token, _, _ in tokens[: len(newline)]] != [token for token, _, _ in newline]:
            return self._encoded(text, False)
        return [(token, start - 1, stop - 1) for token, start, stop in tokens[len(newline) :]]

    def _spelled(self, text: str) -> list[int]:
        """The tokens of a text, none of which is an added token."""
        if not text:
            return []
        backend = self.tokenizer.backend_tokenizer

        def spelled(text: str) -> list[int]:
            text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
            splits = (
                [text]
                if backend.pre_tokenizer is None
                else [s for s, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
            )
            return [token.id for split in splits for token in backend.model.tokenize(split)]

        newline = [token for token, _, _ in self._encoded("\n", False)]
        tokens = spelled("\n" + text)
        return tokens[len(newline) :] if tokens[: len(newline)] == newline else spelled(text)


def _pairs(tokens: Iterable[str]) -> set[str]:
    """Tokens that come in pairs, such as ``<think>`` and ``</think>``: they are within messages, not around them."""
    closing = {token for token in tokens if token.startswith("</")}
    opening = {token for token in tokens if token.replace("<", "</", 1) in closing}
    return opening | {token.replace("<", "</", 1) for token in opening}
