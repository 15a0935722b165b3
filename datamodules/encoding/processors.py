"""Tokenizers and processors of the transformers library, a tokenizer that needs no files, and encoders for them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.contracts.remote_code import without_asking

from ..files import started_in
from ..media.modalities import MODALITIES
from ..options import DRAW, ChatOptions
from .chat import ChatEncoder
from .hf_audio import HFAudio
from .hf_visual import HFVisual, placeholder_of
from .media_processor import Augment, MediaProcessor
from .phi4_audio import Phi4Audio
from .template import read_template
from .visual import TargetProcessor, VisualProcessor
from .voxtral import VoxtralAudio, fast_tokenizer

VOXTRAL = "VoxtralProcessor"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", DRAW)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|{{ part.type }}_pad|>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, with lists of parts as contents."""


def byte_tokenizer(modalities: Sequence[str] = ()) -> Any:
    """A tokenizer of 262 tokens: padding ("<|endoftext|>", id 0), tokens of the template, of images, of videos and of
    drawing, and 256 bytes.

    Args:
        modalities: further ones, each of which has one more token, from 262 on.

    Returns: a `PreTrainedTokenizerFast` with a ChatML template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*SPECIAL, *(token for name in modalities if (token := MODALITIES[name].token) not in SPECIAL)]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet, *special[len(SPECIAL) :]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
        model_max_length=1 << 30,
    )


def load_processor(given: Any, trust_remote_code: bool = False, modalities: Sequence[str] = ()) -> tuple[Any, Any]:
    """Load a fast tokenizer, with a chat template if it has one, and the processor around it if there is one.

    Args:
        given: a folder, which may be remote, or a name; a processor, a tokenizer, or "bytes".
        trust_remote_code: whether Python code in that folder may run.
        modalities: see `byte_tokenizer`.

    Returns: the tokenizer, and the processor or ``None``.

    Raises:
        ValueError: the tokenizer is not a fast one, the processor cannot be used here, or it needs code of its own,
            which may not run.
    """
    from transformers import AutoProcessor, ProcessorMixin, dynamic_module_utils

    if given == "bytes":
        return byte_tokenizer(modalities), None
    if isinstance(given, str | Path):
        trust = "set loading.trust_remote_code=True in the DataModule"
        with without_asking(f"the processor {given}", trust, dynamic_module_utils):
            try:  # the tokenizer, if the folder has no processor
                given = AutoProcessor.from_pretrained(local_folder(given), trust_remote_code=trust_remote_code)
            except OSError as error:
                raise ValueError(_unknown(str(given), error)) from error
            except json.JSONDecodeError as error:
                raise ValueError(f"processor={str(given)!r} has a file that is not JSON: {error}") from error
            except ValueError as error:
                said = " ".join(str(error).split())
                raise ValueError(f"processor={str(given)!r} cannot be loaded: {said}") from error
    processor: Any = given if isinstance(given, ProcessorMixin) else None
    if type(processor).__name__ == VOXTRAL:
        return fast_tokenizer(processor), processor
    tokenizer: Any = given if processor is None else processor.tokenizer
    if processor is not None and processor.chat_template:
        tokenizer.chat_template = processor.chat_template
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} must be a fast tokenizer, which knows the characters of each token"
        )
    return tokenizer, processor


def _unknown(given: str, error: OSError) -> str:
    if Path(given).is_dir():
        return f"processor={given!r} has no processor or tokenizer that can be loaded: {error}"
    return (
        f"processor={given!r} is no folder{started_in(given)}, and no name that can be fetched ({error}): give the "
        "folder of a processor or tokenizer"
    )


def _sounds(processor: Any) -> HFAudio | None:
    """What prepares sounds with a processor, if it takes any."""
    if type(getattr(processor, "audio_processor", None)).__name__ == "Phi4MultimodalFeatureExtractor":
        return Phi4Audio(processor)
    return None if getattr(processor, "feature_extractor", None) is None else HFAudio(processor)


def chat_encoder(
    processor: Any,
    visual: VisualProcessor | None,
    target: TargetProcessor | None,
    chat: ChatOptions,
    augment: Sequence[Augment],
    seed: int,
    cut_at: int | None,
    trust_remote_code: bool = False,
    media: Mapping[str, MediaProcessor] = MappingProxyType({}),
) -> ChatEncoder:
    """The encoder for a processor, whose own media tokens and media preparation are used where `visual` and `media`
    name no other.

    Args:
        processor, trust_remote_code: see `load_processor`.
        visual, target, augment, seed, cut_at, media: see `ChatEncoder`.

    Raises:
        ValueError: the options contradict the tokenizer or its template, or a modality is not known.
    """
    if visuals := sorted(media.keys() & {"image", "video"}):
        raise ValueError(f"media names {visuals[0]!r}: images and videos are prepared by visual, so give that instead")
    if unknown := sorted(media.keys() - MODALITIES.keys()):
        raise ValueError(
            f"media names {unknown[0]!r}, which is no modality: known are {', '.join(MODALITIES)}; others are added by "
            "register(Modality(...))"
        )
    tokenizer, loaded = load_processor(processor, trust_remote_code, tuple(media))
    if chat.template is not None:
        chat = replace(chat, template=read_template(chat.template))
    feature_tokens: dict[str, str] = {}
    if type(loaded).__name__ == VOXTRAL:  # whose template and tokens are the tokenizer's
        chat = replace(chat, tokens={**chat.tokens, "audio": loaded.audio_token})
        media, loaded = {"audio": VoxtralAudio(loaded), **media}, None
    if loaded is not None:
        own = {name: token for name in MODALITIES if (token := placeholder_of(loaded, name))}
        for name, token in chat.tokens.items():
            if own.get(name, token) != token:
                raise ValueError(
                    f"chat.tokens[{name!r}]={token!r}: the processor has {own[name]!r} for this, so leave it out"
                )
        chat = replace(chat, tokens={**chat.tokens, **own})
        if "audio" not in media and (sounds := _sounds(loaded)) is not None:
            media = {**media, "audio": sounds}
        if visual is None and getattr(loaded, "image_processor", None) is not None:
            visual = HFVisual()
    if isinstance(visual, HFVisual):
        if visual.processor is None and getattr(loaded, "image_processor", None) is None:
            raise ValueError(
                f"visual is HFVisual without a processor, and processor={processor!r} prepares no images: give the "
                "processor of a vision-language model, or another visual"
            )
        visual = visual if visual.processor is not None else replace(visual, processor=loaded)
        feature_tokens = visual.feature_tokens | {name: chat.media_tokens[name] for name in media}
    encoder = ChatEncoder(tokenizer, loaded, visual, target, chat, tuple(augment), seed, feature_tokens, cut_at, media)
    encoder.check()
    return encoder
