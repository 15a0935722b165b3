"""From an example to tokens: chat template, placeholders expanded to one token per feature row, what is to be learnt.

Media are planned from their sizes; nothing is decoded. Knows tokenizers and templates; knows nothing of files or ranks.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from bigmac_lightning.batch import MediaData

from .collate import Media, Sample, Target
from .example import Example, ExampleError, Image, Message, Size, Video
from .visual import Augment, MediaPlan, TargetProcessor, VisualProcessor, seeded_augment

IMAGE, VIDEO, DRAW = "<|image_pad|>", "<|video_pad|>", "<|draw|>"


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

    def encode(
        self, example: Example, sizes: Sequence[Size], name: str, draw: tuple[object, ...] | None = None
    ) -> Sample:
        """
        Args:
            sizes: of the example's media, in their order, then of its target.
            name: what errors call the example.
            draw: what its random numbers depend on besides the seed; ``None``: no augmentation.

        Raises:
            ExampleError: text and media do not fit together, or the template refuses the conversation.
        """
        example.check()
        plans = self._plans(example, sizes)
        text, spans, order = self._render(example, plans)
        tokens, labelled, rows = self._tokens(example, plans, text, spans, order)
        media = [self._media(example.media[i], sizes[i], plans[i], rows[i], draw) for i in order]
        targets: list[Target] = []
        if example.target is not None:
            target, draw_id = self._target(example.target, sizes[-1], len(tokens), draw or (name,)), self._draw_id()
            targets.append(target)
            tokens += [draw_id] * target.rows
            labelled += [False] * target.rows
        return Sample(tokens, labelled, media, targets, name)

    def _tokens(
        self,
        example: Example,
        plans: Sequence[MediaPlan],
        text: str,
        spans: Sequence[tuple[int, int]],
        order: Sequence[int],
    ) -> tuple[list[int], list[bool], list[list[int]]]:
        """Token ids, whether each is to be learnt, and for each media item the places of its rows.

        Args:
            text, spans, order: as of `_render`.
        """
        try:
            added = self._adds_special_tokens(text)
            encoded = self.tokenizer(text, add_special_tokens=added, return_offsets_mapping=True)
        except Exception as error:  # lone surrogates, which no tokenizer takes
            raise ExampleError(f"has a text that cannot be tokenized: {type(error).__name__}: {error}") from error
        tokens: list[int] = []
        labelled: list[bool] = []
        rows: list[list[int]] = [[] for _ in plans]
        left = list(reversed(order))
        features: set[Any] = {self._id(token) for token in self.feature_tokens or (self.image_token, self.video_token)}
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token not in features:
                labelled.append(bool(tokens) and any(a <= start and stop <= b for a, b in spans))
                tokens.append(token)
                continue
            if not left:
                raise self._miscounted(example)
            plan, where = plans[left[-1]], rows[left[-1]]
            times = plan.rows if plan.text is None else 1
            where += range(len(tokens), len(tokens) + times)
            labelled += [False] * times
            tokens += [token] * times
            if len(where) >= plan.rows:
                left.pop()
        if left:
            raise self._miscounted(example)
        return tokens, labelled, rows

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

    def _render(self, example: Example, plans: Sequence[MediaPlan]) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The text of the conversation, the spans of it that the model is to say, and the numbers of the media items in
        the order in which it has them: a template may put images first.
        """
        turns = [self._turn(message) for message in example.messages]

        def written(number: int, reply: bool) -> tuple[str, list[int]]:
            return self._expand(self._apply(turns[:number], reply), example, plans) if number else ("", [])

        ends_with_request = example.target is not None and example.messages[-1].role != "assistant"
        text, order = written(len(turns), ends_with_request)
        if len(order) < len(plans):
            raise self._miscounted(example)
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(example.messages):
            if message.role != "assistant":
                continue
            before, after = written(i, True)[0], written(i + 1, False)[0]
            if not after.startswith(before):  # some templates start a reply otherwise than they ask for one
                shared = _common_start(before, after)
                before = shared if len(shared) > len(written(i, False)[0]) else before
            if not (after.startswith(before) and text.startswith(after)):
                raise ExampleError(
                    "has a turn that the chat template writes differently when others follow: what the assistant said "
                    "cannot be told apart; train on conversations with a single reply, or change the template"
                )
            spans.append((len(before), len(after.rstrip("\n"))))
        return text, spans, order

    def _expand(self, text: str, example: Example, plans: Sequence[MediaPlan]) -> tuple[str, list[int]]:
        """With the texts that stand for media, where their plans have one; and the numbers of these items."""
        order: list[int] = []
        left = {
            token: [i for i, item in enumerate(example.media) if isinstance(item, kind)]
            for token, kind in self._placeholders
        }

        def replacement(match: re.Match[str]) -> str:
            if not left[match[0]]:
                raise self._miscounted(example)
            order.append(left[match[0]].pop(0))
            plan = plans[order[-1]]
            return match[0] if plan.text is None else plan.text

        return re.sub("|".join(re.escape(token) for token in left), replacement, text), order

    @property
    def _placeholders(self) -> tuple[tuple[str, type], ...]:
        return (self.image_token, Image), (self.video_token, Video)

    def _turn(self, message: Message) -> dict[str, Any]:
        if not self._takes_parts:
            texts = [part if isinstance(part, str) else self._token(part) for part in message.parts]
            return {"role": message.role, "content": "".join(texts)}
        content: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                content.append({"type": "image" if isinstance(part, Image) else "video"})
        return {"role": message.role, "content": content}

    def _token(self, item: Image | Video) -> str:
        return self.image_token if isinstance(item, Image) else self.video_token

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes lists of parts. Others write a string, or nothing of a list: with those, the
        tokens of images and videos stand in the text."""
        try:
            probe = self._apply([{"role": "user", "content": [{"type": "text", "text": "<probe>"}]}], False)
        except ExampleError:
            return False
        return "<probe>" in probe and "'type'" not in probe

    def _apply(self, turns: Sequence[dict[str, Any]], reply: bool) -> str:
        writer = self.tokenizer if self.processor is None else self.processor
        try:
            return writer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # templates raise what they like
            raise ExampleError(f"is refused by the chat template: {type(error).__name__}: {error}") from error

    def _miscounted(self, example: Example) -> ExampleError:
        text = self._apply([self._turn(message) for message in example.messages], False)
        counts: list[str] = []
        for token, kind in self._placeholders:
            unknown = not self.feature_tokens and self._id(token) is None
            if unknown and any(isinstance(item, kind) for item in example.media):
                return ExampleError(
                    f"has {kind.__name__.lower()}s, but the tokenizer has no token {token}: choose another as "
                    f"{kind.__name__.lower()}_token, or add it"
                )
            items = sum(isinstance(item, kind) for item in example.media)
            counts.append(f"{text.count(token)} {token} for {items} {kind.__name__.lower()}s")
        for token in {*self.feature_tokens} - {token for token, _ in self._placeholders}:
            counts.append(f"{text.count(token)} {token}, where none may be")
        return ExampleError(
            f"has placeholder tokens that do not fit its media: {', '.join(counts)}. Texts must not contain these "
            "tokens, and the chat template must write one for each item"
        )

    def _adds_special_tokens(self, text: str) -> bool:
        """As the library does: with a processor, unless the template writes them itself."""
        start = self.tokenizer.bos_token
        return self.processor is not None and not (start and text.startswith(start))

    def _id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found == self.tokenizer.unk_token_id else found

    def _draw_id(self) -> int:
        found = self._id(self.draw_token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {self.draw_token!r}: choose another draw_token or add it")
        return found


def _common_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _load_augmented(load: Callable[..., MediaData], transforms: Sequence[Augment], seed: int) -> MediaData:
    return load(seeded_augment(transforms, seed))


def _number(*parts: object) -> int:
    """A seed that depends on all parts and is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
