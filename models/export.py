"""Writes the tensors of a trained `MultimodalLM` as a folder that `transformers` loads, with the library's own code."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from . import meta_model
from .lora import ALPHA, adapters_in, fold_lora

OTHERS = "other_components.safetensors"
"""The file for tensors that are no part of the Hugging Face model."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "config.json")
"""The files of a source folder that are written anew, or that hold old weights."""


def _config_of(json_of_config: dict[str, Any]) -> PreTrainedConfig:
    """The config of its JSON, in which the library writes a dict for an infinite number."""

    def number(made: dict[str, Any]) -> Any:
        return float(made["__float__"]) if made.keys() == {"__float__"} else made

    return AutoConfig.for_model(**json.loads(json.dumps(json_of_config), object_hook=number))


def export(
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    source: Path | None,
    output: Path,
    dtype: torch.dtype | None = None,
    lora: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Write safetensors, config, and the files of processor and tokenizer.

    Args:
        tensors: the tensors by their names in the module ("llm.model.layers.0...", "encoders.image.model.visual...").
        config: the config of the Hugging Face model, as a dict.
        source: the folder from which everything but weights and config is copied; ``None``: nothing is copied.
        output: the folder to write, which must be empty or not exist yet.
        dtype: the type of the written tensors; ``None``: the type that they have.
        lora: the options of components with adapters, which are folded into the weights.

    Returns: the names of the tensors that are no part of the Hugging Face model (those of generators and of further
        encoders). They are written to the file `OTHERS` in the same folder.

    Raises:
        ValueError: tensors are missing, `output` is not empty, or a file of `source` is a link to another place.
    """
    copied = [] if source is None else files_to_copy(source)
    _check_empty(output)
    whole = meta_model.build_on_meta(_config_of(config), "eager")
    expected = whole.state_dict().keys()
    state: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in fold_lora(tensors, lora or {}).items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        component, short = name.partition(".")[0], in_whole(name)
        if component in ("llm", "encoders") and short in expected:
            if short in state:
                raise ValueError(f"several components have {short}, and the Hugging Face model has it once")
            state[short] = tensor
        else:
            others[name] = tensor
    for copy, original in meta_model.tied_output(whole).items():
        if original in state:
            state.pop(copy, None)  # where the two were on different ranks, the checkpoint has both
    if missing := [name for name in expected if name not in state and name not in whole.all_tied_weights_keys]:
        raise ValueError(
            f"the checkpoint is not a whole {type(whole).__name__}: {len(missing)} tensors are missing, "
            f"first {missing[0]}"
        )
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    # The saved config names the type of the model's weights. The method of nn.Module works on the meta device.
    torch.nn.Module.to(whole, max(dtypes, key=lambda dtype: dtype.itemsize))
    whole.save_pretrained(output, state_dict=state)
    if others:
        save_file({name: tensor.contiguous() for name, tensor in others.items()}, output / OTHERS)
    for path in copied:
        shutil.copy2(path, output / path.name)
    return list(others)


def export_adapters(
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    source: Path | None,
    output: Path,
    dtype: torch.dtype | None,
    lora: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Write low-rank adapters alone, as a folder that peft loads beside the model that training started from.

    Args:
        tensors, config, output, dtype, lora: see `export`.
        source: the folder of the model that training started from.

    Returns: the names of the tensors of components without adapters. They are not written, though they may be trained.

    Raises:
        ValueError: there are no adapters, the model's weights were drawn, adapters are of a component that is no part
            of the Hugging Face model, or `output` is not empty.
    """
    from peft import LoraConfig

    if not lora:
        raise ValueError("the checkpoint has no low-rank adapters: leave out --adapters")
    if source is None:
        raise ValueError(
            "training did not start from the weights of a folder, so adapters alone would be worth nothing: leave out "
            "--adapters, and weights and adapters are written together"
        )
    _check_empty(output)
    expected = meta_model.build_on_meta(_config_of(config), "eager").state_dict().keys()
    ranks, alphas, adapters = dict[str, int](), dict[str, int](), dict[str, Tensor]()
    for layer, side, tensor in adapters_in(tensors):
        (component,) = (component for component in lora if layer.startswith(f"{component}."))
        short = in_whole(layer)
        if f"{short}.weight" not in expected:
            raise ValueError(f"{layer} is no part of the Hugging Face model, so peft cannot load its adapter")
        ranks[short], alphas[short] = lora[component]["r"], lora[component].get("lora_alpha", ALPHA)
        adapters[f"base_model.model.{short}.{side}.weight"] = tensor.contiguous().to(dtype or tensor.dtype)
    scaled = {bool(options.get("use_rslora")) for options in lora.values()}
    if len(scaled) > 1:
        raise ValueError("components differ in use_rslora, which peft has once for all: leave out --adapters")
    made = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(alphas.values()),
        target_modules=sorted(ranks),
        rank_pattern=ranks if len({*ranks.values()}) > 1 else {},
        alpha_pattern=alphas if len({*alphas.values()}) > 1 else {},
        use_rslora=scaled.pop(),
        base_model_name_or_path=str(source),
        inference_mode=True,
    )
    output.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(str(output))
    save_file(adapters, output / "adapter_model.safetensors")
    return [name for name in tensors if not any(name.startswith(f"{component}.") for component in lora)]


def in_whole(name: str) -> str:
    """The name in the Hugging Face model of what has a name in the module. In a `UnifiedLM`, the weights that are not
    those of drawings are such a model."""
    component, _, rest = name.partition(".")
    return rest.replace(".others.", ".") if component == "llm" else rest.partition(".")[2]


def _check_empty(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: give --output a new one")


def files_to_copy(source: Path) -> list[Path]:
    """Tokenizer, processor, chat template, generation defaults, license: every file of a folder that holds no weights.

    Raises:
        ValueError: one of them is a link to another place, whose contents would end in the exported folder.
    """
    weights = {path for pattern in WEIGHTS for path in source.glob(pattern)}
    found = [path for path in source.iterdir() if path.is_file() and path not in weights]
    home = source.resolve()
    # in the hub's cache, the files of a snapshot are links to blobs
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in found:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, out of the folder that is exported from: replace it by a copy "
                "if it is meant, or remove it"
            )
    return found
