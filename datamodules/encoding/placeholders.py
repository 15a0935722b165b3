"""Placeholders in the text of an example: each stands for an item of media, and becomes the text of its plan.

A template may write images in another order than the messages have them (before all text, for example), and a text of
the example may contain a placeholder as ordinary characters.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import ExampleError
from ..example import Example
from ..media.modalities import modality_of
from .marks import alternatives
from .media_processor import MediaPlan
from .text import Edit, Text


@dataclass(frozen=True)
class Placeholders:
    """
    Attributes:
        tokens: by modality, what the chat template writes for an item.
        is_known: whether the tokenizer has a token.
    """

    tokens: Mapping[str, str]
    is_known: Callable[[str], bool]

    def expand(self, text: Text, example: Example, plans: Sequence[MediaPlan]) -> tuple[Text, list[int]]:
        """The text in which each placeholder is replaced by the text of its media plan, where the plan has one.

        Args:
            plans: one for each media item of the example, in their order.

        Returns: the text, and the numbers of the media items in the order in which the text has them.

        Raises:
            ExampleError: the text does not have one placeholder for each media item.
        """
        order: list[int] = []
        edits: list[Edit] = []
        left: dict[str, list[int]] = {token: [] for token in self.tokens.values()}
        for i, item in enumerate(example.media):
            left[self.tokens[modality_of(item).name]].append(i)
        for match in self._pattern.finditer(text.text):
            if text.is_given(*match.span()):  # ordinary characters of the example
                continue
            if not left[match[0]]:
                raise self._wrong_number(example, text)
            order.append(left[match[0]].pop(0))
            plan = plans[order[-1]]
            if plan.text is not None:
                edits.append((*match.span(), plan.text))
        if len(order) < len(plans):
            raise self._wrong_number(example, text)
        return text.edited(edits), order

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(alternatives([*self.tokens.values()]))

    def _wrong_number(self, example: Example, text: Text) -> ExampleError:
        found = [match for match in self._pattern.finditer(text.text) if not text.is_given(*match.span())]
        counts: list[str] = []
        for name, token in self.tokens.items():
            items = sum(modality_of(item).name == name for item in example.media)
            if items and not self.is_known(token):
                return ExampleError(
                    f"has {name} items, but the tokenizer has no token {token}: name another in chat.tokens, or add it "
                    "to the tokenizer"
                )
            if items or any(match[0] == token for match in found):
                counts.append(f"{sum(match[0] == token for match in found)} {token} for {items} {name} items")
        return ExampleError(
            f"has media for which the chat template does not write its tokens: {', '.join(counts)}. It must write one "
            "for each item: correct the template, or give another one as chat.template"
        )
