"""From an example to tokens: chat template, placeholders expanded to one token per feature row, what is to be learnt.

Media are planned from their sizes; nothing is decoded. Knows tokenizers and templates; knows nothing of files or ranks.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

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
    """

    tokenizer: Any
    visual: VisualProcessor | None = None
    target: TargetProcessor | None = None
    image_token: str = IMAGE
    video_token: str = VIDEO
    draw_token: str = DRAW
    augment: Sequence[Augment] = ()
    seed: int = 0

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
        text, spans = self._render(example, plans)
        draw_id = self._draw_id() if example.target is not None else 0
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except Exception as error:  # lone surrogates, which no tokenizer takes
            raise ExampleError(f"has a text that cannot be tokenized: {type(error).__name__}: {error}") from error
        tokens: list[int] = []
        labelled: list[bool] = []
        rows: list[list[int]] = [[] for _ in plans]  # where the rows of each item go
        number = 0  # of the item that the next placeholder belongs to
        kinds: dict[Any, type] = {self._id(self.image_token): Image, self._id(self.video_token): Video}
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token not in kinds:
                labelled.append(bool(tokens) and any(a <= start and stop <= b for a, b in spans))
                tokens.append(token)
                continue
            if number >= len(plans) or not isinstance(example.media[number], kinds[token]):
                raise self._miscounted(example, encoded["input_ids"])
            times = plans[number].rows if plans[number].text is None else 1
            rows[number] += range(len(tokens), len(tokens) + times)
            labelled += [False] * times
            tokens += [token] * times
            number += len(rows[number]) >= plans[number].rows
        if number < len(plans):
            raise self._miscounted(example, encoded["input_ids"])
        media = [
            self._media(item, size, plan, where, draw)
            for item, size, plan, where in zip(example.media, sizes, plans, rows, strict=False)
        ]
        targets: list[Target] = []
        if example.target is not None:
            assert self.target is not None, "checked with the plans"
            processor, image = self.target, example.target
            load = partial(processor.load, image, sizes[-1])
            noise = _number(self.seed, "noise", *(draw or (name,)))
            targets.append(
                Target(
                    processor.generator, len(tokens), processor.rows, processor.shape, noise, load,
                    processor.cost, image.file.name,
                )
            )  # fmt: skip
            tokens += [draw_id] * processor.rows
            labelled += [False] * processor.rows
        return Sample(tokens, labelled, media, targets, name)

    def _plans(self, example: Example, sizes: Sequence[Size]) -> list[MediaPlan]:
        items = example.media
        assert len(sizes) == len(items) + (example.target is not None), "a size per item"
        if items and self.visual is None:
            raise ExampleError("has images or videos, but the DataModule was given no visual processor")
        if example.target is not None and self.target is None:
            raise ExampleError("has a target image, but the DataModule was given no target processor")
        if self.visual is None:
            return []
        return [self.visual.plan(item, size) for item, size in zip(items, sizes, strict=False)]

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
        )

    @property
    def _visual(self) -> VisualProcessor:
        assert self.visual is not None, "checked with the plans"
        return self.visual

    # -- text ----------------------------------------------------------------------------------------------------------

    def _render(self, example: Example, plans: Sequence[MediaPlan]) -> tuple[str, list[tuple[int, int]]]:
        """The text of the conversation, and the spans of it that the model is to say."""
        turns = [self._turn(message) for message in example.messages]
        ends_with_request = example.target is not None and example.messages[-1].role != "assistant"
        text = self._expand(self._apply(turns, ends_with_request), plans)
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(example.messages):
            if message.role != "assistant":
                continue
            before = self._expand(self._apply(turns[:i], True), plans) if i else ""
            after = self._expand(self._apply(turns[: i + 1], False), plans)
            if not (after.startswith(before) and text.startswith(after)):
                raise ExampleError(
                    "has a turn that the chat template writes differently when others follow: what the assistant said "
                    "cannot be told apart; train on conversations with a single reply, or change the template"
                )
            spans.append((len(before), len(after.rstrip("\n"))))
        return text, spans

    def _expand(self, text: str, plans: Sequence[MediaPlan]) -> str:
        """With the texts that stand for media, where their plans have one."""
        if all(plan.text is None for plan in plans):
            return text
        left = iter(plans)
        tokens = f"{re.escape(self.image_token)}|{re.escape(self.video_token)}"

        def replacement(match: re.Match[str]) -> str:
            plan = next(left, None)
            return match[0] if plan is None or plan.text is None else plan.text

        return re.sub(tokens, replacement, text)

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
        try:
            return self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # templates raise what they like
            raise ExampleError(f"is refused by the chat template: {type(error).__name__}: {error}") from error

    def _miscounted(self, example: Example, tokens: Sequence[int]) -> ExampleError:
        counts: list[str] = []
        for token, kind in ((self.image_token, Image), (self.video_token, Video)):
            if self._id(token) is None and any(isinstance(item, kind) for item in example.media):
                return ExampleError(
                    f"has {kind.__name__.lower()}s, but the tokenizer has no token {token}: choose another as "
                    f"{kind.__name__.lower()}_token, or add it"
                )
            items = sum(isinstance(item, kind) for item in example.media)
            counts.append(f"{tokens.count(self._id(token))} {token} for {items} {kind.__name__.lower()}s")
        return ExampleError(
            f"has placeholder tokens that do not fit its media: {', '.join(counts)}. Texts must not contain these "
            "tokens, and the chat template must write one for each item"
        )

    def _id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found == self.tokenizer.unk_token_id else found

    def _draw_id(self) -> int:
        found = self._id(self.draw_token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {self.draw_token!r}: choose another draw_token or add it")
        return found


def _load_augmented(load: Callable[..., Tensor], transforms: Sequence[Augment], seed: int) -> Tensor:
    return load(seeded_augment(transforms, seed))


def _number(*parts: object) -> int:
    """A seed that depends on all parts and is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
