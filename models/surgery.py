"""Takes Hugging Face models apart: building on the meta device, dropping modules, giving weights to what is left.

Modules that go are replaced by pass-throughs, so that everything that stays keeps its name and its layer index.
Knows what all models of the library share; knows nothing of stages, families or ranks.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from bigmac_lightning.checkpoints.mismatches import first_few

from .initialization import allocate_and_initialize
from .llm.attention import AttentionNotThereError, refused_clearly

_RETURNED = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
}
NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "embedding_norm", "norm_f", "ln_f")
"""What decoders call their final norm."""


class PassThrough(nn.Module):
    """Stands where a module was that this process does not keep, with the settings that others may ask it for."""

    def __init__(self, instead_of: nn.Module | None = None) -> None:
        super().__init__()
        for name, value in vars(instead_of).items() if instead_of is not None else ():
            if not name.startswith("_") and name != "training" and isinstance(value, str | int | float):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]


def build_on_meta(config: PreTrainedConfig, attn_implementation: str) -> Any:
    """The whole model without weights: with a language model head, and vision where the config has any. It has a
    config of its own, without what would change what its forward returns.

    Raises:
        ValueError: the library cannot build it, or the attention implementation cannot be had here.
    """
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the config (model_type {config.model_type!r}) has a quantization_config: quantized weights cannot be "
            "trained. Load the model with transformers, dequantized, save it, and start from that folder"
        )
    auto = AutoModelForImageTextToText if "vision_config" in config.sub_configs else AutoModelForCausalLM
    config = copy.deepcopy(config)
    for part in filter(None, (config, *(getattr(config, name, None) for name in config.sub_configs))):
        for name, value in _RETURNED.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
    try:
        with refused_clearly(attn_implementation, config.model_type), torch.device("meta"):
            whole = auto.from_config(config, attn_implementation=attn_implementation)
    except AttentionNotThereError:
        raise
    except Exception as error:
        raise ValueError(
            f"transformers cannot build a model of model_type {config.model_type!r} of this config "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error
    return whole.to("meta")  # some draw weights on the CPU


@dataclass(frozen=True)
class Names:
    """Of the parts of a decoder, beside its `layers`.

    Attributes:
        decoder: in the whole model.
        embedding, norm: in the decoder: what comes before the layers and what comes after them.
    """

    decoder: str
    embedding: str
    norm: str


def names_of(whole: Any) -> Names:
    """
    Raises:
        ValueError: the model's decoder is not made of an embedding, layers and a norm.
    """
    decoder = whole.get_decoder()
    children = dict(decoder.named_children())
    embedding = whole.get_input_embeddings()
    embeddings = [name for name, child in children.items() if child is embedding]
    norms = [name for name in NORMS if name in children]
    found = {"embedding": embeddings, "layers": [name for name in children if name == "layers"], "final norm": norms}
    if missing := [part for part, names in found.items() if not names]:
        raise ValueError(
            f"{type(whole).__name__} (model_type {whole.config.model_type!r}) cannot be cut into stages: its decoder "
            f"has no {', '.join(missing)}; choose a decoder-only model such as qwen3, llama or mistral"
        )
    return Names(path_of(decoder, whole), embeddings[0], norms[0])


def weights_beside(whole: Any, decoder: Any) -> list[str]:
    """Names of a model's weights that are neither its decoder's nor its output layer's."""
    known = {id(p) for part in (decoder, whole.get_output_embeddings()) for p in part.parameters()}
    return [name for name, parameter in whole.named_parameters() if id(parameter) not in known]


def tied_output(whole: Any) -> dict[str, str]:
    """The name of the output weight and that of the embedding's, if they are one; else nothing."""
    output, embedding = whole.get_output_embeddings(), whole.get_input_embeddings()
    if output.weight is not embedding.weight:
        return {}
    return {f"{path_of(output, whole)}.weight": f"{path_of(embedding, whole)}.weight"}


def path_of(module: nn.Module, whole: nn.Module) -> str:
    """The name of a module inside another."""
    return next(name for name, child in whole.named_modules() if child is module)


def drop(whole: nn.Module, name: str) -> None:
    """Replace a module by a pass-through."""
    whole.set_submodule(name, PassThrough())


def check_checkpointing(whole: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: its layers cannot run again in the backward.
    """
    if not whole.supports_gradient_checkpointing:
        raise ValueError(f"transformers has no gradient checkpointing for {type(whole).__name__}: leave it out")


def materialize(
    whole: PreTrainedModel, keep: Callable[[Any], None], source: str | None, seed: int, dtype: torch.dtype | None
) -> Any:
    """Drop what is not kept and give the rest weights, on the CPU.

    Args:
        whole: on the meta device; not to be used any longer.
        keep: drops modules of such a model.
        source: folder of a checkpoint to read; only tensors of kept modules are read. ``None``: initial weights.
        seed: of initial weights.
        dtype: of the weights; ``None``: as in the checkpoint.

    Raises:
        ValueError: the checkpoint cannot be read, or is not of this model.
    """
    if source is None:
        keep(whole)
        allocate_and_initialize(whole, seed)
        if dtype is not None:
            _convert(whole, dtype)
        return whole
    return _load(type(whole), keep, source, whole.config, dtype)


def _convert(whole: Any, dtype: torch.dtype) -> None:
    """As if the weights had been loaded in this type: what the library computes with in float32 stays so, such as the
    frequencies of rotary embeddings and some routers."""
    with torch.device("meta"):
        model = type(whole)._from_config(copy.deepcopy(whole.config), dtype=dtype)
        made = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    exact = [re.compile(pattern.replace("*", ".*")) for pattern in whole._get_dtype_plan(dtype)]
    for name, tensor in [*whole.named_parameters(remove_duplicate=False), *whole.named_buffers()]:
        kept = any(pattern.search(name) for pattern in exact)
        tensor.data = tensor.data.to(torch.float32 if kept else made[name].dtype)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's progress bars, and its report of all tensors that this process leaves unread."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load(
    model: type[PreTrainedModel],
    keep: Callable[[Any], None],
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
) -> Any:
    """Through the library's own loader, which reads tensors one by one and knows how names changed over time."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        model.__init__(self, *args, **kwargs)
        keep(self)

    # same name and module: the library looks conversions up by them
    part: Any = type(model.__name__, (model,), {"__init__": build, "__module__": model.__module__})
    part._keys_to_ignore_on_load_unexpected = [r".*"]
    if not Path(source).is_dir():
        raise ValueError(f"there is no checkpoint folder at {source}")
    try:
        with _quietly():
            loaded, found = part.from_pretrained(
                source,
                config=config,
                dtype="auto" if dtype is None else dtype,
                attn_implementation=config._attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                local_files_only=True,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load {source} as a {model.__name__}: {error}") from error
    wrong = [f"{name}: missing" for name in sorted(found["missing_keys"])]
    wrong += [f"{name}: wrong shape" for name, *_ in sorted(found["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"cannot load {source} as a {model.__name__}: tensors do not fit its config: {first_few(wrong)}"
        )
    return loaded.train()
