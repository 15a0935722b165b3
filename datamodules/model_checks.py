"""Checks that a model can take the batches that a `ChatEncoder` leads to, before any of them is made."""

from collections.abc import Sequence
from typing import Any

from bigmac_lightning.contracts.components import LanguageModel
from bigmac_lightning.contracts.module import PipelineModule

from .encoding.chat import ChatEncoder
from .encoding.hf_audio import HFAudio
from .encoding.hf_visual import HFVisual
from .example import MediaPart
from .media.modalities import MODALITIES

DRAWN = "drawn"
"""The name that the token of pictures has among the placeholders of an LLM that draws them itself."""


def check_model(module: PipelineModule, encoder: ChatEncoder, packed: bool) -> None:
    """
    Args:
        packed: whether rows have several samples.

    Raises:
        ValueError: the model cannot keep packed samples apart, its token ids are others than the tokenizer's, or it has
            no encoder or generator for what the DataModule prepares.
    """
    if packed and (reason := module.llm.refuses_packing):
        raise ValueError(f"{reason}: set packing.packed to False, which gives each sample a row of its own")
    _check_vocabulary(module.llm, encoder.tokenizer)
    _check_placeholders(module.llm, encoder)
    _check_drawings(module, encoder)
    _check_components(module, encoder)


def check_items(module: PipelineModule, encoder: ChatEncoder, items: Sequence[MediaPart], where: str) -> None:
    """
    Args:
        where: what has these items.

    Raises:
        ValueError: the model has no encoder for an item.
    """
    for item in items:
        name = next((kind.name for kind in MODALITIES.values() if type(item) is kind.part), "")
        processor = encoder.media.get(name, encoder.visual)
        wanted = getattr(processor, f"{name}_encoder", getattr(processor, "encoder", None))
        if wanted is not None and wanted not in module.encoders:
            known = ", ".join(module.encoders)
            raise ValueError(
                f"{where} has {name} items, which are for the encoder {wanted!r}, and the model has "
                f"{f'only {known}' if known else 'none'}: take them out, or train a model that has this encoder"
            )


def _check_placeholders(llm: LanguageModel, encoder: ChatEncoder) -> None:
    """
    Raises:
        ValueError: features would replace other tokens than the model expects, or ordinary tokens would be taken for
            places of features.
    """
    tokenizer = encoder.tokenizer
    token_of = {i: token for token, i in tokenizer.get_vocab().items()}
    names = {i: token for token, i in tokenizer.get_added_vocab().items()}
    for modality, expected in llm.placeholders.items():
        if modality == DRAWN:
            continue
        found = encoder.feature_ids.get(modality)
        prepares = encoder.media.get("audio") if modality == "audio" else encoder.visual
        elsewhere = prepares is None
        if found == expected or (elsewhere and (expected in names or expected not in token_of)):
            continue
        token = f" ({token_of[expected]!r})" if expected in token_of else ""
        given = "no token" if found is None else f"{token_of[found]!r}, with the id {found},"
        raise ValueError(
            f"the model's config has {modality}_token_id={expected}{token}, and the processor has {given} for the "
            f"features of {modality}s: give MultimodalDataModule the processor that belongs to the model, or correct "
            f"{modality}_token_id in its config"
        )


def _check_drawings(module: PipelineModule, encoder: ChatEncoder) -> None:
    """
    Raises:
        ValueError: the LLM draws, and its pictures would not come in, or other tokens would be taken for them; or it
            does not draw.
    """
    target, llm, tokenizer = encoder.target, type(module.llm).__name__, encoder.tokenizer
    drawn = module.llm.placeholders.get(DRAWN)
    if drawn is None:
        if target is not None and target.encoder is not None:
            raise ValueError(f"target.encoder={target.encoder!r}: leave it out, as {llm} does not draw in its layers")
        return
    if target is not None and target.encoder is None:
        raise ValueError(
            f"{llm} draws in its layers, so each target has to come in with noise: set target.encoder to the model's "
            f"NoisyPictureEncoder, one of {', '.join(module.encoders)}"
        )
    ordinary = {i: token for token, i in tokenizer.get_vocab().items()}.keys() - tokenizer.get_added_vocab().values()
    found = drawn if target is None else encoder.draw_id()
    if found != drawn or drawn in ordinary:
        raise ValueError(
            f"the model has drawn_token={drawn} ({tokenizer.convert_ids_to_tokens(drawn)!r}), and chat.draw_token="
            f"{encoder.options.draw_token!r} has the id {encoder.draw_id()}: give both the same token"
        )


def _check_components(module: PipelineModule, encoder: ChatEncoder) -> None:
    """
    Raises:
        ValueError: what an argument of the DataModule prepares, no component of the model takes.
    """
    given: dict[str, Any] = {f"media[{name!r}]": processor for name, processor in encoder.media.items()}
    given["visual"] = encoder.visual
    given = {name: made for name, made in given.items() if not isinstance(made, HFVisual | HFAudio)}  # of a processor
    if encoder.target is not None:
        given["target"] = encoder.target
    for argument, processor in given.items():
        names = [getattr(processor, name, None) for name in ("encoder", "image_encoder", "video_encoder")]
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        if wanted and not any(name in module.encoders for name in wanted):
            raise ValueError(_without("encoder", wanted, argument, list(module.encoders)))
    if encoder.target is not None and encoder.target.generator not in module.generators:
        raise ValueError(_without("generator", [encoder.target.generator], "target", list(module.generators)))


def _without(kind: str, wanted: list[str], argument: str, known: list[str]) -> str:
    names = " or ".join(map(repr, wanted))
    has = f"only {', '.join(known)}" if known else "none"
    return (
        f"{argument} of the DataModule is for the {kind} {names}, and the model has {has}: leave {argument} out, name "
        f"another {kind} there, or give the model this one"
    )


def _check_vocabulary(llm: LanguageModel, tokenizer: Any) -> None:
    """
    Raises:
        ValueError: the tokenizer has tokens that the model has no embedding for.
    """
    if not llm.vocabulary:
        return
    ids, known = tokenizer.get_vocab(), llm.placeholders.values()
    beyond = sorted(token for token, i in ids.items() if i >= llm.vocabulary and i not in known)
    if beyond:
        raise ValueError(
            f"{len(beyond)} tokens of the tokenizer, such as {beyond[0]!r} with the id {ids[beyond[0]]}, lie "
            f"beyond the LLM's vocabulary of {llm.vocabulary}: give MultimodalDataModule the processor that "
            "belongs to the model, or the model a larger vocab_size"
        )
