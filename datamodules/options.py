"""The options of `MultimodalDataModule` that few runs change, in four groups.

In YAML each group is a dictionary, and in Python a dataclass::

    chat: {learn: last}                  chat=ChatOptions(learn="last")
    packing: {buffer_size: 4096}         packing=PackingOptions(buffer_size=4096)

Each class checks what can be checked without the data and the tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .media.modalities import MODALITIES
from .sources.splitting import HeldOut

DRAW = "<|draw|>"
"""A token that no tokenizer has by itself."""

Learn = Literal["all", "last"]
InText = Literal["text", "refuse"]


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation becomes text and tokens, and which of them the model learns.

    Attributes:
        template: the path of a .jinja file, or the chat template itself; ``None``: the processor's own.
        template_kwargs: values of the template's variables, such as ``{"enable_thinking": False}``. An example may
            have `chat_template_kwargs` of its own, which override these.
        learn: the model learns "all" replies of the assistant, or only the "last" ones: those after the last message of
            the user. `Message.learn` overrides it for one message.
        end_of_reply: a special token. Where the template ends a reply without a special token, this one is appended and
            learnt. ``None``: such conversations are refused. Empty: their replies are learnt without an end.
        special_tokens: how a text is treated that contains a special token, such as ``<|im_end|>``: "text" encodes the
            token as ordinary characters; "refuse" counts the example as broken.
        allowed_special: special tokens that remain tokens where a text contains them.
        tokens: by modality, what the template writes for an item, such as ``{"image": "<image>"}``; for one that is not
            named it is ``<|image_pad|>``, ``<|video_pad|>`` and so on. A processor's own tokens come first.
        draw_token: the token that is repeated for the rows that condition a generator.
    """

    template: str | Path | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    learn: Learn = "all"
    end_of_reply: str | None = None
    special_tokens: InText = "text"
    allowed_special: Sequence[str] = ()
    tokens: dict[str, str] = field(default_factory=dict)
    draw_token: str = DRAW

    def __post_init__(self) -> None:
        _check_choice("chat.learn", self.learn, ("all", "last"))
        _check_choice("chat.special_tokens", self.special_tokens, ("text", "refuse"))
        if isinstance(self.allowed_special, str):
            raise ValueError(f"chat.allowed_special={self.allowed_special!r}: give a list of tokens")
        named = {f"tokens[{name!r}]": token for name, token in self.tokens.items()} | {"draw_token": self.draw_token}
        for name, token in named.items():
            if not token:
                raise ValueError(f"chat.{name} is empty: name a token of the tokenizer")
        if unknown := sorted(self.tokens.keys() - MODALITIES.keys()):
            raise ValueError(
                f"chat.tokens names {unknown[0]!r}, which is no modality: known are {', '.join(MODALITIES)}"
            )

    @property
    def media_tokens(self) -> dict[str, str]:
        """By modality, what the template writes for an item."""
        return {name: self.tokens.get(name, modality.token) for name, modality in MODALITIES.items()}


@dataclass(frozen=True)
class MixtureOptions:
    """Which examples of the training sources an epoch has.

    Attributes:
        weights: relative frequency of each training source in an epoch, positive. ``None``: sources are weighted by
            their numbers of examples, or equally if one of them is a stream.
        samples_per_epoch: number of training examples in an epoch; ``None``: as many as all sources have together.
        steps_per_epoch: number of training steps in an epoch. It is needed, and allowed, only if one of the training
            sources is a stream; the next epoch then continues where the last one stopped.
        stream_parts: number of parts into which streams are divided. Each part is read, packed and dealt by itself, and
            steps come from the parts in turn. With as many workers as parts, each worker reads a part of its own; with
            one part, every worker reads everything. The order of samples depends on it, and not on the workers.
        val_split: how many examples of each training source are held out and added to the validation sources: a share
            between 0 and 1 (0.05), or a number of examples (500); or a list with one of these for each training source,
            0 for none. The seed decides which examples are held out.
    """

    weights: Sequence[float] | None = None
    samples_per_epoch: int | None = None
    steps_per_epoch: int | None = None
    stream_parts: int = 1
    val_split: HeldOut | Sequence[HeldOut] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and min(self.weights, default=1) <= 0:
            raise ValueError(f"mixture.weights={list(self.weights)}: every weight must be positive")
        _check_at_least_one("mixture.samples_per_epoch", self.samples_per_epoch)
        _check_at_least_one("mixture.steps_per_epoch", self.steps_per_epoch)
        _check_at_least_one("mixture.stream_parts", self.stream_parts)


@dataclass(frozen=True)
class PackingOptions:
    """How examples become microbatches.

    Attributes:
        packed: the samples of a microbatch are concatenated into one row without padding; their positions restart, so
            that attention keeps them apart. ``False``: each sample has a row, padded to the longest.
        buffer_size: number of consecutive examples that are packed together. A larger buffer wastes fewer tokens; with
            streams, every worker holds this many examples in memory.
        ordered: training examples keep their order, as those of evaluation always do: they are not shuffled, and a
            microbatch ends where the next example does not fit.
        attention_tokens: length of a sample, in tokens, at which attention costs as much as the rest of a layer. It is
            about 12 times the hidden size of the LLM: the rest of a layer multiplies by about 12 * width**2 weights per
            token, attention by tokens * width values.
        truncation: how an example is treated that has more than `token_budget` tokens: "refuse" counts it as broken;
            "end" cuts off its end, unless that would cut an image, a video or a target, or leave nothing to learn.
    """

    packed: bool = True
    buffer_size: int = 1024
    ordered: bool = False
    attention_tokens: float = 12 * 4096
    truncation: Literal["refuse", "end"] = "refuse"

    def __post_init__(self) -> None:
        _check_choice("packing.truncation", self.truncation, ("refuse", "end"))
        _check_at_least_one("packing.buffer_size", self.buffer_size)
        if self.attention_tokens <= 0:
            raise ValueError(f"packing.attention_tokens={self.attention_tokens}: it must be positive")


@dataclass(frozen=True)
class LoadingOptions:
    """How workers load media, where measurements are stored, and whether code of the processor may run.

    Attributes:
        augment: torchvision v2 transforms, applied in this order to training images and videos, with new random numbers
            in each epoch. They map uint8 pixels (..., C, H, W) to such pixels. Targets are not augmented.
        prefetch: number of batches that each worker prepares in advance.
        cache_dir: folder in which the measurements of sources are stored: sizes of media and numbers of tokens.
        trust_remote_code: whether Python code that comes with the processor may run, on every rank.
    """

    augment: Sequence[nn.Module] = ()
    prefetch: int = 2
    cache_dir: str | Path = "~/.cache/bigmac_lightning"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_at_least_one("loading.prefetch", self.prefetch)


def _check_choice(name: str, given: object, choices: Sequence[str]) -> None:
    if given not in choices:
        raise ValueError(f"{name}={given!r}: choose {' or '.join(map(repr, choices))}")


def _check_at_least_one(name: str, given: int | None) -> None:
    if given is not None and given < 1:
        raise ValueError(f"{name}={given}: it must be at least 1")
