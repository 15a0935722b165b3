"""Whole Hugging Face models on the meta device: building them, naming their parts, dropping modules from them.

A dropped module is replaced by a pass-through, so that everything that stays keeps its name and its layer index.
"""

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    dynamic_module_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from bigmac_lightning.contracts.remote_code import RemoteCodeError, without_asking

from .families import FAMILIES
from .initialization import TRUST
from .llm.attention import AttentionNotThereError, refused_clearly
from .pass_through import PassThrough

_RETURNED = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
}
"""What a config may ask a forward to return besides its result, and what it must not ask for here."""
NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "embedding_norm", "norm_f", "ln_f")
"""The names that decoders have for their final norm."""
WITH_EMBEDDING = (
    "embed_tokens_per_layer",
    "per_layer_model_projection",
    "per_layer_projection_norm",
    "altup_projections",
)
WITH_NORM = ("altup_unembed_projections",)
"""The names of modules that only the first stage needs besides the embedding, and only the last one besides the norm
(Gemma 3n and 4)."""
AROUND_TOWERS = "embed_tokens_extend"
"""The name of a module in a decoder that holds towers (Phi-4-multimodal). It is kept, as the decoder calls it."""


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of the library that builds a model of this config: with vision or audio towers if it has any."""
    if config.model_type not in FAMILIES:
        return AutoModelForImageTextToText if "vision_config" in config.sub_configs else AutoModelForCausalLM
    # AudioFlamingo 3 is among models from sequence to sequence, although its LLM is a decoder.
    known = config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return AutoModelForMultimodalLM if known else AutoModelForSeq2SeqLM


def build_on_meta(config: PreTrainedConfig, attn_implementation: str, trust_remote_code: bool = False) -> Any:
    """The whole model without weights: with a language model head, and with vision if the config has any.

    The model has its own copy of the config, in which nothing changes what a forward returns.

    Args:
        trust_remote_code: whether code of the pretrained model may run.

    Raises:
        ValueError: transformers cannot build the model, lacks the attention implementation, or would have to run code
            of the model.
    """
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the config (model_type {config.model_type!r}) has a quantization_config: quantized weights cannot be "
            "trained. Load the model with transformers, dequantized, save it, and start from that folder"
        )
    auto = auto_class(config)
    config = copy.deepcopy(config)
    for part in filter(None, (config, *(getattr(config, name, None) for name in config.sub_configs))):
        for name, value in _RETURNED.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
    try:
        with (
            without_asking(config._name_or_path or f"model_type {config.model_type!r}", TRUST, dynamic_module_utils),
            refused_clearly(attn_implementation, config.model_type),
            torch.device("meta"),
        ):
            whole = auto.from_config(
                config,
                attn_implementation=implementations(config, attn_implementation),
                trust_remote_code=trust_remote_code,
            )
    except (AttentionNotThereError, RemoteCodeError):
        raise
    except Exception as error:
        raise ValueError(
            f"transformers cannot build a model of model_type {config.model_type!r} of this config "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error
    return whole.to("meta")  # some models draw weights on the CPU whatever the default device is


def implementations(config: PreTrainedConfig, chosen: str | None) -> Any:
    """The attention implementations of a model's parts, as the library takes them: the chosen one, but another for a
    tower of sounds that does not have it (Gemma 4), or that adds numbers of its own to scores (Phi-4-multimodal)."""
    if config.model_type == "gemma4":
        return {"": chosen, "audio_config": "eager"}
    if config.model_type == "phi4_multimodal" and chosen not in ("eager", "sdpa"):
        return {"": chosen, "audio_config": "sdpa"}
    return chosen


def check_checkpointing(whole: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: the model's layers cannot run again in the backward.
    """
    if not whole.supports_gradient_checkpointing:
        raise ValueError(f"transformers has no gradient checkpointing for {type(whole).__name__}: leave it out")


# -- names of parts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """The names of the parts of a language model. The layers of its decoder are always called `layers`.

    Attributes:
        decoder: the name of the decoder in the whole model.
        embedding: the name of the embedding in the decoder.
        norm: the name of the final norm in the decoder.
        output: the name of the output layer in the whole model.
        with_embedding: the names of further modules in the decoder that come before its first layer.
        with_norm: the names of those that come after its last layer.
        returned: the number of values that a layer returns as a tuple; 0: it returns hidden states alone.
        scale_of_ids: what the decoder multiplies embeddings by that it makes of token ids, but not those it is given.
    """

    decoder: str
    embedding: str
    norm: str
    output: str
    with_embedding: tuple[str, ...] = ()
    with_norm: tuple[str, ...] = ()
    returned: int = 0
    scale_of_ids: float = 1.0


def names_of(whole: Any) -> Names:
    """
    Raises:
        ValueError: the model's decoder does not consist of an embedding, layers and a norm.
    """
    decoder, embedding = whole.get_decoder(), whole.get_input_embeddings()
    if embedding not in decoder.children():  # the library has found what is around it (Llama 4)
        decoder = next((child for child in decoder.children() if embedding in child.children()), decoder)
    children = dict(decoder.named_children())
    embeddings = [name for name, child in children.items() if child is embedding]
    norms = [name for name in NORMS if name in children]
    found = {"embedding": embeddings, "layers": [name for name in children if name == "layers"], "final norm": norms}
    if missing := [part for part, names in found.items() if not names]:
        raise ValueError(
            f"{type(whole).__name__} (model_type {whole.config.model_type!r}) cannot be cut into stages: its decoder "
            f"has no {', '.join(missing)}; choose a decoder-only model such as qwen3, llama or mistral"
        )
    output = path_of(output_layer(whole), whole)
    first, last = (tuple(_inside(decoder, names)) for names in (WITH_EMBEDDING, WITH_NORM))
    return Names(path_of(decoder, whole), embeddings[0], norms[0], output, first, last)


def output_layer(whole: Any) -> Any:
    """The output layer of a model, or of the language model that is its decoder (Nemotron Omni)."""
    output = whole.get_output_embeddings()
    return whole.get_decoder().get_output_embeddings() if output is None else output


def _inside(decoder: Any, names: Collection[str]) -> Iterator[str]:
    """The names of those children that a decoder has; of a list, those of its modules."""
    for name in names:
        if isinstance(child := getattr(decoder, name, None), nn.ModuleList):
            yield from (f"{name}.{k}" for k in range(len(child)))
        elif isinstance(child, nn.Module):
            yield name


def weights_beside(whole: Any, decoder: Any) -> list[str]:
    """The names of a model's weights that belong neither to its decoder nor to its output layer."""
    known = {id(p) for part in (decoder, output_layer(whole)) for p in part.parameters()}
    return [name for name, parameter in whole.named_parameters() if id(parameter) not in known]


def tied_output(whole: Any) -> dict[str, str]:
    """``{name of the output weight: name of the embedding's weight}`` if these are one parameter, else nothing."""
    output, embedding = output_layer(whole), whole.get_input_embeddings()
    if output.weight is not embedding.weight:
        return {}
    return {f"{path_of(output, whole)}.weight": f"{path_of(embedding, whole)}.weight"}


def path_of(module: nn.Module, whole: nn.Module) -> str:
    """The name of a module inside another."""
    return next(name for name, child in whole.named_modules() if child is module)


# -- dropping modules --------------------------------------------------------------------------------------------------


def drop(whole: nn.Module, name: str) -> None:
    """Replace a module by a pass-through."""
    whole.set_submodule(name, PassThrough())


def drop_towers(decoder: nn.Module) -> None:
    """Drop the towers that lie inside a decoder."""
    around = getattr(decoder, AROUND_TOWERS, nn.Module())
    for name, _ in list(around.named_children()):
        drop(around, name)


def keep_language_model(whole: Any, names: Names, layers: Collection[int], embedding: bool, head: bool) -> None:
    """Drop everything but these layers of the decoder, its embedding and its head. A vision tower and a projector are
    dropped, too.

    Args:
        whole: a model with or without weights; parts of it may have been dropped before.
        names: the names of its parts.
        layers: the indices of the layers to keep.
        embedding: whether to keep the embedding.
        head: whether to keep the final norm and the output layer.
    """
    decoder = whole.get_submodule(names.decoder)
    drop_towers(decoder)
    around = names.decoder.split(".")[:-1]
    for depth in range(len(around) + 1) if around else ():
        inside = ".".join(around[:depth])
        for name, _ in list(whole.get_submodule(inside).named_children()):
            path = f"{inside}.{name}".removeprefix(".")
            if not f"{names.decoder}.".startswith(f"{path}.") and not f"{names.output}.".startswith(f"{path}."):
                drop(whole, path)
    for k in set(range(len(decoder.layers))) - set(layers):
        decoder.layers[k] = PassThrough(decoder.layers[k], names.returned)
    if not head:
        # A norm without parameters costs nothing, and some decoders use it before their layers as well.
        if any(True for _ in decoder.get_submodule(names.norm).parameters()):
            drop(decoder, names.norm)
        drop(whole, names.output)
        for name in names.with_norm:
            drop(decoder, name)
    if not embedding:
        for name in (names.embedding, *names.with_embedding):
            drop(decoder, name)
    if not (embedding and head):
        whole.all_tied_weights_keys = {}


def drop_parameters_beside_decoder(whole: Any, names: Names) -> None:
    """Drop the parameters that lie beside the decoder without a module of their own (a separator of images): they
    belong to the encoder."""
    around = names.decoder.rpartition(".")[0]
    if around:
        parent = whole.get_submodule(around)
        parent._parameters.update(dict.fromkeys(parent._parameters))
