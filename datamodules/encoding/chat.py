"""ChatEncoder: it turns an example into token ids, with one token per feature row of its media, and labels.

Media are planned from their sizes alone; nothing is decoded. The text and what is learnt of it come from replies.py.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from bigmac_lightning.contracts.batch import MediaData

from ..errors import ExampleError
from ..example import Example, Image, MediaPart, Size, Video
from ..loading.collate import Media, Sample, Target
from ..media.modalities import modality_of
from ..options import ChatOptions
from .media_processor import Augment, MediaPlan, MediaProcessor
from .placeholders import Placeholders
from .replies import Replies, plain_text
from .special import SpecialTokens
from .template import ChatTemplate
from .text import Text, strings_in
from .truncation import cut
from .visual import TargetProcessor, VisualProcessor, seeded_augment

NO_RUN = (sys.maxsize, sys.maxsize)
"""A run of characters after every text, which ends a search for the next learnt run."""


@dataclass(frozen=True)
class ChatEncoder:
    """Makes the `Sample` of an `Example`.

    Attributes:
        tokenizer: a fast tokenizer of the transformers library, with a chat template.
        processor: the processor around the tokenizer, if there is one. It then applies the template, and the tokenizer
            adds its special tokens, as it does for its model. Without a processor, the tokenizer adds none to those of
            the template.
        visual: plans and loads images and videos; ``None``: examples have none.
        media: by modality, what plans and loads items of others.
        target: plans and loads what generators make; ``None``: examples have no targets.
        options: the template, the tokens that stand for media, and what is learnt. Its `template`, if not ``None``, is
            the text of a template, and not a path.
        augment: transforms of the pixels of images and videos in training; targets are not transformed.
        seed: of augmentation and of generators' noise.
        feature_tokens: by modality, the token that features replace; empty: the tokens of the options.
        cut_at: maximum number of tokens of a sample, the rest of which is cut off; ``None``: all tokens are kept.
    """

    tokenizer: Any
    processor: Any = None
    visual: VisualProcessor | None = None
    target: TargetProcessor | None = None
    options: ChatOptions = field(default_factory=ChatOptions)
    augment: Sequence[Augment] = ()
    seed: int = 0
    feature_tokens: Mapping[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    media: Mapping[str, MediaProcessor] = field(default_factory=dict)

    def check(self) -> None:
        """
        Raises:
            ValueError: the options contradict the tokenizer or its template.
        """
        options, special = self.options, self._special
        if reason := self._template.refused_variable(options.template_kwargs):
            raise ValueError(f"chat.template_kwargs has {reason}")
        for text in strings_in(options.template_kwargs):
            if found := special.pattern.search(text):
                raise ValueError(
                    f"chat.template_kwargs has the special token {found[0]}: name it in chat.allowed_special"
                )
        if options.end_of_reply and not special.written.search(options.end_of_reply):
            raise ValueError(
                f"chat.end_of_reply={options.end_of_reply!r} has no special token of the tokenizer; a model stops only "
                "at one"
            )
        self._check_tokens()
        if reason := self._template.fault():
            which = "the tokenizer's chat template" if options.template is None else "chat.template"
            raise ValueError(f"{which} {reason}: set chat.template to one that writes conversations")

    def _check_tokens(self) -> None:
        """
        Raises:
            ValueError: a token that stands for media or for a drawing is not one token of the tokenizer, or stands for
                something else as well.
        """
        options = self.options
        named = {name: options.media_tokens[name] for name in (*options.tokens, *self.media)}
        own = {name for name, token in named.items() if token == getattr(self.processor, f"{name}_token", None)}
        used = {f"chat.tokens[{name!r}]": token for name, token in named.items() if name not in own}
        used |= {"chat.draw_token": options.draw_token} if self.target is not None else {}
        added = self.tokenizer.get_added_vocab()
        for key, token in used.items():
            if token not in added:
                why = "is an ordinary word" if self._id(token) is not None else "is not one token"
                raise ValueError(
                    f"{key}={token!r} {why} for the tokenizer: name one of its added tokens, or add it to the "
                    "tokenizer (and a row to the model's embedding, if its id is beyond the vocabulary)"
                )
        if options.draw_token in (*options.media_tokens.values(), *self.feature_tokens.values()):
            raise ValueError(f"chat.draw_token={options.draw_token!r} stands for media already: name another token")
        padding = self.tokenizer.pad_token_id
        if padding is not None and padding in self._features:
            raise ValueError(
                f"the tokenizer's pad_token is {self.tokenizer.pad_token!r}, which stands for media: set another one"
            )

    @property
    def has_template(self) -> bool:
        return bool(self._template.source())

    def fingerprint(self) -> str:
        """A text that changes whenever the tokens of an example or the costs of its media would."""
        options = self.options
        settings = (
            self.visual and self.visual.fingerprint(),
            self.target,
            {name: processor.fingerprint() for name, processor in self.media.items()},
            (options.media_tokens, options.draw_token),
            (tuple(self.feature_tokens.values()), self.processor is None, self.cut_at),
            (options.learn, options.end_of_reply, options.special_tokens, tuple(options.allowed_special)),
            json.dumps(dict(options.template_kwargs), sort_keys=True, default=repr),
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
            draw: what its random numbers depend on besides the seed; ``None``: the media are not augmented.

        Raises:
            ExampleError: text and media do not fit together, the template refuses the conversation, or cutting the
                sample off would cut media or a target, or leave nothing to learn.
        """
        example.check()
        text = plain_text(example, self._template) if example.is_text else self._replies.text(example)
        return cut(self._sample(text, example, sizes, name, draw), self.cut_at)

    def prompt(self, example: Example, sizes: Sequence[Size], name: str = "the prompt") -> Sample:
        """A sample that ends where the model is to continue: after what asks the assistant for a reply; of a text,
        after its last word; if the example has a target, after the tokens from which it is drawn.

        Args:
            sizes, name: see `encode`.

        Raises:
            ExampleError: see `encode`; or the assistant has spoken last.
        """
        example.check()
        text = plain_text(example, self._template) if example.is_text else self._replies.prompt(example)
        sample = self._sample(text, example, sizes, name, None)
        tokens, end = list(sample.tokens), self.tokenizer.eos_token_id
        if example.is_text and tokens[-1] == end and not sample.targets:
            tokens.pop()
        return replace(sample.to_draw(), tokens=tokens, labelled=[False] * len(tokens))

    @property
    def reply_ends(self) -> frozenset[int]:
        """The tokens that end a reply."""
        return self._replies.ends

    def _sample(
        self, text: Text, example: Example, sizes: Sequence[Size], name: str, draw: tuple[object, ...] | None
    ) -> Sample:
        plans = self._plans(example, sizes)
        text, order = self._placeholders.expand(text, example, plans)
        tokens, labelled, rows = self._tokens(text, plans, order)
        media = [self._media(example.media[i], sizes[i], plans[i], rows[i], draw) for i in order]
        targets: list[Target] = []
        if example.target is not None:
            target, draw_id = self._target(example.target, sizes[-1], len(tokens), draw or (name,)), self.draw_id()
            targets.append(target)
            if self.target is not None and self.target.encoder is not None:
                media.append(Media(self.target.encoder, target.start, target.rows, target.load, name=target.name))
            tokens += [draw_id] * target.rows
            labelled += [False] * target.rows
        return Sample(tokens, labelled, media, targets, name)

    def _tokens(
        self, text: Text, plans: Sequence[MediaPlan], order: Sequence[int]
    ) -> tuple[list[int], list[bool], list[list[int]]]:
        """Token ids, whether each is learnt, and for each media item the indices of the tokens of its rows.

        Args:
            order: the numbers of the media items in the order in which the text has them.
        """
        tokens: list[int] = []
        labelled: list[bool] = []
        rows: list[list[int]] = [[] for _ in plans]
        left = list(reversed(order))
        runs = iter(text.learnt)
        first, last = next(runs, NO_RUN)
        for token, start, stop in self._special.encode(text, self._adds_special_tokens(text)):
            while start >= last:
                first, last = next(runs, NO_RUN)
            if token not in self._features:
                labelled.append(bool(tokens) and first < stop and start < stop)
                tokens.append(token)
                continue
            if not left:
                raise ExampleError("has more tokens for rows of media than its media have")
            # a plan's own text has all its feature tokens; otherwise one placeholder stands for all rows
            plan, indices = plans[left[-1]], rows[left[-1]]
            times = plan.rows if plan.text is None and not plan.one_token else 1
            indices += [len(tokens)] * plan.rows if plan.one_token else range(len(tokens), len(tokens) + times)
            labelled += [False] * times
            tokens += [token] * times
            if len(indices) >= plan.rows:
                left.pop()
        if left:
            raise ExampleError("has fewer tokens for rows of media than its media have")
        if text.whole:
            self._append_end(tokens, labelled, bool(text.learnt) and text.learnt[-1][1] == len(text.text))
        return tokens, labelled, rows

    def _append_end(self, tokens: list[int], labelled: list[bool], learnt: bool) -> None:
        """Append the end token to a text, if the tokenizer has not done so."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no eos_token to put after a text: set one")
        if not tokens or tokens[-1] != end:
            tokens.append(end)
            labelled.append(False)
        labelled[-1] = learnt and len(tokens) > 1

    @cached_property
    def _features(self) -> frozenset[int]:
        """Ids of the tokens that features replace."""
        return frozenset(self.feature_ids.values())

    @property
    def feature_ids(self) -> dict[str, int]:
        """By modality, the id of the token that features replace, if the tokenizer has the token."""
        tokens = self.feature_tokens or self.options.media_tokens
        return {name: found for name, token in tokens.items() if (found := self._id(token)) is not None}

    # -- media ---------------------------------------------------------------------------------------------------------

    def _plans(self, example: Example, sizes: Sequence[Size]) -> list[MediaPlan]:
        items = example.media
        assert len(sizes) == len(items) + (example.target is not None), "one size per item"
        if example.target is not None and self.target is None:
            raise ExampleError("has a target image, but the DataModule was given no target processor")
        images = sum(isinstance(item, Image) for item in items)
        others: dict[str, list[int]] = {}
        plans: dict[int, MediaPlan] = {}
        for i, item in enumerate(items):
            if isinstance(item, Image | Video):
                plans[i] = self._processor(item).plan(item, sizes[i], images == 1)
            else:
                others.setdefault(modality_of(item).name, []).append(i)
        for indices in others.values():
            given, processor = [items[i] for i in indices], self._processor(items[indices[0]])
            made = processor.plans(given, [sizes[i] for i in indices])
            plans.update((i, replace(plan, beside_images=images > 0)) for i, plan in zip(indices, made, strict=True))
        return [plans[i] for i in range(len(items))]

    def _processor(self, item: MediaPart) -> MediaProcessor:
        """What prepares an item."""
        name = modality_of(item).name
        found = self.media.get(name, self.visual if isinstance(item, Image | Video) else None)
        if found is None:
            given = "visual" if isinstance(item, Image | Video) else f'media={{"{name}": ...}}'
            raise ExampleError(f"has {name} items, but the DataModule was given no processor for them: {given}")
        return found

    def _media(
        self, item: MediaPart, size: Size, plan: MediaPlan, rows: list[int], draw: tuple[object, ...] | None
    ) -> Media:
        load = partial(self._processor(item).load, item, size, plan)
        if self.augment and draw is not None and isinstance(item, Image | Video):
            load = partial(_load_augmented, load, self.augment, _seed(self.seed, "augment", *draw, rows[0]))
        contiguous = rows[-1] - rows[0] == len(rows) - 1
        return Media(
            plan.encoder,
            rows[0],
            plan.rows,
            load,
            plan.cost,
            item.file.name,
            plan.grid,
            () if contiguous or plan.one_token else tuple(rows),
            plan.seconds,
            plan.one_token,
        )

    def _target(self, image: Image, size: Size, start: int, draw: tuple[object, ...]) -> Target:
        target = self.target
        assert target is not None, "checked with the plans"
        load, noise = partial(target.load, image, size), _seed(self.seed, "noise", *draw)
        return Target(target.generator, start, target.rows, target.shape, noise, load, target.cost, image.file.name)

    # -- template and tokens -------------------------------------------------------------------------------------------

    @cached_property
    def _template(self) -> ChatTemplate:
        options = self.options
        return ChatTemplate(
            self.tokenizer,
            options.media_tokens,
            self.processor,
            None if options.template is None else str(options.template),
            options.template_kwargs,
        )

    @cached_property
    def _special(self) -> SpecialTokens:
        options = self.options
        placeholders = [*options.media_tokens.values(), options.draw_token, *self.feature_tokens.values()]
        return SpecialTokens.of(self._template, placeholders, options.special_tokens, options.allowed_special)

    @cached_property
    def _replies(self) -> Replies:
        return Replies(self._template, self._special, self.options.learn, self.options.end_of_reply)

    @cached_property
    def _placeholders(self) -> Placeholders:
        return Placeholders(self.options.media_tokens, self._is_usable)

    def _is_usable(self, token: str) -> bool:
        """Whether the tokenizer has a placeholder as a token. It need not where other tokens are replaced."""
        others = bool(self.feature_tokens) and token not in self.feature_tokens.values()
        return others or self._id(token) is not None

    def _adds_special_tokens(self, text: Text) -> bool:
        """Whether the tokenizer adds its special tokens: with a processor it does, unless the template wrote them."""
        start = self.tokenizer.bos_token
        return text.whole or (self.processor is not None and not (start and text.text.startswith(start)))

    def _id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found == self.tokenizer.unk_token_id else found

    def draw_id(self) -> int:
        """The id of the token that stands for what a generator draws."""
        token = self.options.draw_token
        found = self._id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}: choose another chat.draw_token, or add it")
        return found


def _load_augmented(load: Callable[..., MediaData], transforms: Sequence[Augment], seed: int) -> MediaData:
    return load(seeded_augment(transforms, seed))


def _seed(*parts: object) -> int:
    """A seed of 56 bits that depends on all parts, and is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
