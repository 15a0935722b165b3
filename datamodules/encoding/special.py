"""Special tokens: those that a template writes are tokens, those that texts contain are words.

A text that contains ``<|im_end|>`` must not end a turn. Knows tokenizers; knows nothing of messages or media.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from ..example import ExampleError
from ..options import InText
from .marks import alternatives
from .template import ChatTemplate
from .text import Run, Text

TAG = re.compile(r"[^\w\s]")
"""What tells tokens that structure a conversation from words that were added to a vocabulary."""

Token = tuple[int, int, int]
"""Its id, and the run of characters that it stands for."""


@dataclass(frozen=True)
class SpecialTokens:
    """Which tokens have no place in texts, and what becomes of texts that contain them.

    Attributes:
        tokenizer: a fast one.
        control: contents of the tokens that only the template may write.
        spoken: those of them that the assistant may say, as the template looks for them there: ``<think>``.
        allowed: contents of further such tokens, which texts may have, too.
        in_text: "text": such a text is encoded as the characters that it consists of; "refuse": it is an error.
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
        """Control tokens are the special ones of the tokenizer, those that it lists as `chat_control_tokens`, and those
        that the template writes around turns, whatever the tokenizer calls them.

        Args:
            placeholders: tokens that stand for media.
            allowed: tokens that texts may contain.
        """
        tokenizer = template.tokenizer
        added: dict[str, bool] = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        wrong = [token for token in allowed if token not in added or token in placeholders]
        if wrong:
            raise ValueError(
                f"chat.allowed_special={wrong}: name special tokens of the tokenizer, and none that stand for media"
            )
        control = {token for token, special in added.items() if special} | ({*placeholders} & added.keys())
        control |= {*(tokenizer.chat_control_tokens or ())}
        control |= {token for token in added if TAG.search(token) and token in template.ordinary} - _pairs(added)
        control -= {*allowed}
        spoken = control & {*template.looked_for} - {*tokenizer.special_tokens_map.values(), *placeholders}
        return cls(tokenizer, frozenset(control), frozenset(spoken), frozenset(allowed), in_text)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any control token."""
        return re.compile(alternatives([*self.control]))

    @cached_property
    def written(self) -> re.Pattern[str]:
        """Any token that the template writes around what is said."""
        return re.compile(alternatives([*self.control, *self.allowed]))

    @cached_property
    def unspoken(self) -> re.Pattern[str]:
        """Any control token that the assistant does not say."""
        return re.compile(alternatives([*self.control - self.spoken]))

    @cached_property
    def _ids(self) -> frozenset[int]:
        """Of the control tokens."""
        return frozenset(self.tokenizer.convert_tokens_to_ids(token) for token in self.control)

    def encode(self, text: Text, own: bool) -> list[Token]:
        """
        Args:
            own: whether the tokenizer adds the special tokens that it puts around a text.

        Raises:
            ExampleError: the text cannot be tokenized, or has a control token in what is given and `in_text` is
                "refuse".
        """
        tokens = self._encoded(text.text, own)
        words = self._words(tokens, text)
        if not words:
            return tokens
        if self.in_text == "refuse":
            found = dict.fromkeys(text.text[start:stop] for start, stop in words)
            raise ExampleError(
                f"has a text with the special tokens {', '.join(found)}: take them out, name them in "
                'chat.allowed_special, or set chat.special_tokens to "text", which encodes them as ordinary characters'
            )
        added = [token for token in tokens if token[1] == token[2]] if own else []
        front = sum(1 for _ in takewhile(lambda token: token[1] == token[2], tokens)) if own else 0
        tokens = [*added[:front], *self._in_pieces(text.text, words), *added[front:]]
        if self._words(tokens, text):
            raise ExampleError("has a text that the tokenizer takes for a special token however it is cut")
        return tokens

    def _words(self, tokens: Sequence[Token], text: Text) -> list[Run]:
        """Where control tokens have been made of given text."""
        found: list[Run] = []
        for token, start, stop in tokens:
            if token in self._ids and text.is_given(start, stop):
                match = self.pattern.search(text.text, start, stop)  # tokens may take in blanks around them
                run = (start, stop) if match is None else match.span()
                if text.is_given(*run):
                    found.append(run)
        return found

    def _in_pieces(self, text: str, words: Sequence[Run]) -> list[Token]:
        """As the library does with ``sanitize_control_tokens=True``: the text is cut around each word."""
        tokens: list[Token] = []
        at = 0
        for start, stop in (*words, (len(text), len(text))):
            piece = self._continued(text[at:start]) if at else self._encoded(text[:start], False)
            tokens += [(token, at + a, at + b) for token, a, b in piece]
            tokens += [(token, start, stop) for token in self._spelled(text[start:stop])]
            at = stop
        return tokens

    def _encoded(self, text: str, own: bool) -> list[Token]:
        try:
            encoded = self.tokenizer(text, add_special_tokens=own, return_offsets_mapping=True)
        except Exception as error:  # lone surrogates, which no tokenizer takes
            raise ExampleError(f"has a text that cannot be tokenized: {type(error).__name__}: {error}") from error
        return [(token, *run) for token, run in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]

    def _continued(self, text: str) -> list[Token]:
        """Behind a line break, which is taken away again: tokenizers may put a blank before the start of a text."""
        if not text:
            return []
        newline = self._encoded("\n", False)
        tokens = self._encoded("\n" + text, False)
        if [token for token, _, _ in tokens[: len(newline)]] != [token for token, _, _ in newline]:
            return self._encoded(text, False)
        return [(token, start - 1, stop - 1) for token, start, stop in tokens[len(newline) :]]

    def _spelled(self, text: str) -> list[int]:
        """Without any added token."""
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
    """Tokens that open and close something, as ``<think>`` and ``</think>``: within turns, not around them."""
    closing = {token for token in tokens if token.startswith("</")}
    opening = {token for token in tokens if token.replace("<", "</", 1) in closing}
    return opening | {token.replace("<", "</", 1) for token in opening}
