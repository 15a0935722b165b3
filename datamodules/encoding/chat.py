"""From an example to tokens: its text, placeholders expanded to one token per feature row, what is to be learnt.

Media are planned from their sizes; nothing is decoded. Knows tokens and rows; replies.py knows the text and what is
learnt of it; knows nothing of files or ranks.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from bigmac_lightning.contracts.batch import MediaData

from ..example import Example, ExampleError, Image, Size, Video
from ..loading.collate import Media, Sample, Target
from .marks import alternatives
from .replies import Learn, Replies, plain_text
from .special import InText, SpecialTokens
from .template import ChatTemplate
from .text import Edit, Text, strings_in
from .truncation import cut
from .visual import Augment, MediaPlan, TargetProcessor, VisualProcessor, seeded_augment

IMAGE, VIDEO, DRAW = "<|image_pad|>", "<|video_pad|>", "<|draw|>"
NEVER = (sys.maxsize, sys.maxsize)


@dataclass(frozen=True)
class ChatEncoder:
    """Makes the `Sample` of an `Example`.

    Attributes:
        tokenizer: a fast tokenizer of the transformers library, with a chat template.
        visual: plans and loads images and videos; ``None``: text only.
        target: plans and loads what generators make; ``None``: nothing.
        image_token, video_token: what the chat template writes for an image or a video.
        draw_token: stands for each row that conditions a generator.
        augment: transforms of the pixels of images and videos in training; not of targets.
        seed: of augmentation and of generators' noise.
        feature_tokens: those that features replace; none: image_token and video_token.
        processor: around the tokenizer, if there is one. It then applies the template, and the tokenizer adds its
            special tokens, as for its model; alone, a tokenizer adds none to those of the template.
        chat_template: used instead of that of the tokenizer or processor.
        chat_template_kwargs: variables of the template in all examples; an example's own come before them.
        learn, end_of_reply: `learn` and `end` of `Replies`.
        special_tokens, allowed_special: `in_text` and `allowed` of `SpecialTokens`.
        cut_at: most tokens of a sample, of which the rest is cut off; ``None``: all are kept.
    """

    tokenizer: Any
    visual: VisualProcessor | None = None
    target: TargetProcessor | None = None
    image_token: str = IMAGE
    video_token: str = VIDEO
    draw_token: str = DRAW
    augment: Sequence[Augment] = ()
    seed: int = 0
    feature_tokens: Sequence[str] = ()
    processor: Any = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    learn: Learn = "all"
    end_of_reply: str | None = None
    special_tokens: InText = "text"
    allowed_special: Sequence[str] = ()
    cut_at: int | None = None

    def check(self) -> None:
        """
        Raises:
            ValueError: the settings do not go together with the tokenizer and its template.
        """
        try:
            self._template.check_variables(self.chat_template_kwargs)
        except ExampleError as error:
            raise ValueError(f"MultimodalDataModule {error}") from error
        special = self._special
        for text in strings_in(self.chat_template_kwargs):
            if found := special.pattern.search(text):
                raise ValueError(f"chat_template_kwargs has the special token {found[0]}: name it in allowed_special")
        if self.end_of_reply and not special.written.search(self.end_of_reply):
            raise ValueError(
                f"end_of_reply={self.end_of_reply!r} has no special token of the tokenizer; a model stops only at one"
            )

    def fingerprint(self) -> str:
        """Of all that the tokens of an example and the costs of its media depend on."""
        settings = (
            self.visual and self.visual.fingerprint(),
            self.target,
            (self.image_token, self.video_token, self.draw_token, tuple(self.feature_tokens), self.processor is None),
            (self.learn, self.end_of_reply, self.special_tokens, tuple(self.allowed_special), self.cut_at),
            json.dumps(dict(self.chat_template_kwargs), sort_keys=True, default=repr),
            (self._template.source(), self._template.source(True), self.tokenizer.special_tokens_map),
        )
        return repr(settings) + self.tokenizer.backend_tokenizer.to_str()

    def encode(
        self, example: Example, sizes: Sequence[Size], name: str, draw: tuple[object, ...] | None = None
    ) -> Sample:
        """
        Args:
            sizes: of the example's media, in their order, then of its target.
            name: what errors call the example.
            draw: what its random numbers depend on besides the seed; ``None``: no augmentation.

        Raises:
            ExampleError: text and media do not fit together, the template refuses the conversation, or what is to be
                cut off has media or a target in it, or all that is learnt.
        """
        example.check()
        plans = self._plans(example, sizes)
        text, order = self._text(example, plans)
        tokens, labelled, rows = self._tokens(text, plans, order)
        media = [self._media(example.media[i], sizes[i], plans[i], rows[i], draw) for i in order]
        targets: list[Target] = []
        if example.target is not None:
            target, draw_id = self._target(example.target, sizes[-1], len(tokens), draw or (name,)), self._draw_id()
            targets.append(target)
            tokens += [draw_id] * target.rows
            labelled += [False] * target.rows
        return cut(Sample(tokens, labelled, media, targets, name), self.cut_at)

    def _tokens(
        self, text: Text, plans: Sequence[MediaPlan], order: Sequence[int]
    ) -> tuple[list[int], list[bool], list[list[int]]]:
        """Token ids, whether each is to be learnt, and for each media item the places of its rows.

        Args:
            text, order: as of `_text`.
        """
        tokens: list[int] = []
        labelled: list[bool] = []
        rows: list[list[int]] = [[] for _ in plans]
        left = list(reversed(order))
        runs = iter(text.learnt)
        first, last = next(runs, NEVER)
        for token, start, stop in self._special.encode(text, self._adds_special_tokens(text)):
            while start >= last:
                first, last = next(runs, NEVER)
            if token not in self._features:
                labelled.append(bool(tokens) and first < stop and start < stop)
                tokens.append(token)
                continue
            if not left:
                raise ExampleError("has more tokens for rows of images and videos than it has images and videos")
            plan, where = plans[left[-1]], rows[left[-1]]
            times = plan.rows if plan.text is None else 1
            where += range(len(tokens), len(tokens) + times)
            labelled += [False] * times
            tokens += [token] * times
            if len(where) >= plan.rows:
                left.pop()
        if left:
            raise ExampleError("has fewer tokens for rows of images and videos than it has images and videos")
        if text.whole:
            self._end(tokens, labelled, bool(text.learnt) and text.learnt[-1][1] == len(text.text))
        return tokens, labelled, rows

    def _end(self, tokens: list[int], labelled: list[bool], learnt: bool) -> None:
        """Put the end token behind a text, if the tokenizer has not done so."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no eos_token to put behind a text: set one")
        if not tokens or tokens[-1] != end:
            tokens.append(end)
            labelled.append(False)
        labelled[-1] = learnt and len(tokens) > 1

    @cached_property
    def _features(self) -> frozenset[int | None]:
        return frozenset(self._id(token) for token in self.feature_tokens or (self.image_token, self.video_token))

    def _target(self, image: Image, size: Size, start: int, draw: tuple[object, ...]) -> Target:
        assert self.target is not None, "checked with the plans"
        load, noise = partial(self.target.load, image, size), _number(self.seed, "noise", *draw)
        given = (self.target.generator, start, self.target.rows, self.target.shape, noise, load, self.target.cost)
        return Target(*given, name=image.file.name)

    def _plans(self, example: Example, sizes: Sequence[Size]) -> list[MediaPlan]:
        items = example.media
        assert len(sizes) == len(items) + (example.target is not None), "a size per item"
        if items and self.visual is None:
            raise ExampleError("has images or videos, but the DataModule was given no visual processor")
        if example.target is not None and self.target is None:
            raise ExampleError("has a target image, but the DataModule was given no target processor")
        if self.visual is None:
            return []
        alone = sum(isinstance(item, Image) for item in items) == 1
        return [self.visual.plan(item, size, alone) for item, size in zip(items, sizes, strict=False)]

    def _media(
        self, item: Image | Video, size: Size, plan: MediaPlan, rows: list[int], draw: tuple[object, ...] | None
    ) -> Media:
        load = partial(self._visual.load, item, size, plan)
        if self.augment and draw is not None:
            seed = _number(self.seed, "augment", *draw, rows[0])
            load = partial(_load_augmented, load, self.augment, seed)
        together = rows[-1] - rows[0] == len(rows) - 1
        return Media(
            plan.encoder,
            rows[0],
            plan.rows,
            load,
            plan.cost,
            item.file.name,
            plan.grid,
            () if together else tuple(rows),
            plan.seconds,
        )

    @property
    def _visual(self) -> VisualProcessor:
        assert self.visual is not None, "checked with the plans"
        return self.visual

    # -- text ----------------------------------------------------------------------------------------------------------

    def _text(self, example: Example, plans: Sequence[MediaPlan]) -> tuple[Text, list[int]]:
        """The text, what stands for media in it expanded where their plans have a text; and the numbers of the media
        items in the order in which it has them: a template may put images first."""
        text = plain_text(example, self._template) if example.is_text else self._replies.text(example)
        order: list[int] = []
        edits: list[Edit] = []
        left = {
            token: [i for i, item in enumerate(example.media) if isinstance(item, kind)]
            for token, kind in self._placeholders
        }
        for match in self._places.finditer(text.text):
            if text.is_given(*match.span()):  # a text that has the token as words
                continue
            if not left[match[0]]:
                raise self._miscounted(example, text)
            order.append(left[match[0]].pop(0))
            plan = plans[order[-1]]
            if plan.text is not None:
                edits.append((*match.span(), plan.text))
        if len(order) < len(plans):
            raise self._miscounted(example, text)
        return text.edited(edits), order

    @cached_property
    def _template(self) -> ChatTemplate:
        own = (self.processor, self.chat_template, self.chat_template_kwargs)
        return ChatTemplate(self.tokenizer, self.image_token, self.video_token, *own)

    @cached_property
    def _special(self) -> SpecialTokens:
        placeholders = [self.image_token, self.video_token, self.draw_token, *self.feature_tokens]
        return SpecialTokens.of(self._template, placeholders, self.special_tokens, self.allowed_special)

    @cached_property
    def _replies(self) -> Replies:
        return Replies(self._template, self._special, self.learn, self.end_of_reply)

    @cached_property
    def _places(self) -> re.Pattern[str]:
        return re.compile(alternatives([token for token, _ in self._placeholders]))

    @property
    def _placeholders(self) -> tuple[tuple[str, type], ...]:
        return (self.image_token, Image), (self.video_token, Video)

    def _miscounted(self, example: Example, text: Text) -> ExampleError:
        found = [match for match in self._places.finditer(text.text) if not text.is_given(*match.span())]
        counts: list[str] = []
        for token, kind in self._placeholders:
            items = sum(isinstance(item, kind) for item in example.media)
            if items and not self.feature_tokens and self._id(token) is None:
                return ExampleError(
                    f"has {kind.__name__.lower()}s, but the tokenizer has no token {token}: choose another as "
                    f"{kind.__name__.lower()}_token, or add it"
                )
            written = sum(match[0] == token for match in found)
            counts.append(f"{written} {token} for {items} {kind.__name__.lower()}s")
        return ExampleError(
            f"has images or videos for which the chat template does not write its tokens: {', '.join(counts)}. It must "
            "write one for each item"
        )

    def _adds_special_tokens(self, text: Text) -> bool:
        """As the library does: with a processor, unless the template writes them itself."""
        start = self.tokenizer.bos_token
        return text.whole or (self.processor is not None and not (start and text.text.startswith(start)))

    def _id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found == self.tokenizer.unk_token_id else found

    def _draw_id(self) -> int:
        found = self._id(self.draw_token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {self.draw_token!r}: choose another draw_token or add it")
        return found


def _load_augmented(load: Callable[..., MediaData], transforms: Sequence[Augment], seed: int) -> MediaData:
    return load(seeded_augment(transforms, seed))


def _number(*parts: object) -> int:
    """A seed that depends on all parts and is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
