"""Placeholders in the text of an example: each stands for an image or video, and becomes the text of its plan.

A template may write images in another order than the messages have them (before all text, for example), and a text of
the example may contain a placeholder as ordinary characters.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import ExampleError
from ..example import Example, Image, Video
from .marks import alternatives
from .text import Edit, Text
from .visual import MediaPlan


@dataclass(frozen=True)
class Placeholders:
    """
    Attributes:
        image_token, video_token: what the chat template writes for an image or a video.
        is_known: whether the tokenizer has a token.
    """

    image_token: str
    video_token: str
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
        left = {
            token: [i for i, item in enumerate(example.media) if isinstance(item, kind)] for token, kind in self._kinds
        }
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

    @property
    def _kinds(self) -> tuple[tuple[str, type], ...]:
        return (self.image_token, Image), (self.video_token, Video)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(alternatives([token for token, _ in self._kinds]))

    def _wrong_number(self, example: Example, text: Text) -> ExampleError:
        found = [match for match in self._pattern.finditer(text.text) if not text.is_given(*match.span())]
        counts: list[str] = []
        for token, kind in self._kinds:
            name = kind.__name__.lower()
            items = sum(isinstance(item, kind) for item in example.media)
            if items and not self.is_known(token):
                return ExampleError(
                    f"has {name}s, but the tokenizer has no token {token}: choose another as chat.{name}_token, or add "
                    "it to the tokenizer"
                )
            written = sum(match[0] == token for match in found)
            counts.append(f"{written} {token} for {items} {name}s")
        return ExampleError(
            f"has images or videos for which the chat template does not write its tokens: {', '.join(counts)}. It must "
            "write one for each item"
        )
