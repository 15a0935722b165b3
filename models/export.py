"""From a trained model's tensors to a folder that `transformers` loads, with the library's own saving.

Knows tensors by their names in a `MultimodalLM`; knows nothing of checkpoints' formats or of ranks.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from . import surgery
from .lora import fold_lora

OTHERS = "other_components.safetensors"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "config.json")


def export(
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    source: Path | None,
    output: Path,
    dtype: torch.dtype | None = None,
    lora: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Write safetensors, config, and the processor's and tokenizer's files.

    Args:
        tensors: by their names in the module ("llm.model.layers.0...", "encoders.image.model.visual...").
        config: of the Hugging Face model, as a dict.
        source: folder to copy everything from that is neither weights nor config; ``None``: nothing.
        output: the folder to write, which must not hold anything.
        dtype: of what is written; ``None``: as it was trained.
        lora: settings of components with adapters, which are folded into the weights.

    Returns: names of the tensors that are no part of the Hugging Face model (generators, further encoders), which are
        written to `OTHERS` in the same folder.

    Raises:
        ValueError: tensors are missing, or `output` is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: give --output a new one")
    whole = surgery.build_on_meta(AutoConfig.for_model(**config), "eager")
    expected = whole.state_dict().keys()
    state: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in fold_lora(tensors, lora or {}).items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        component, _, rest = name.partition(".")
        short = rest if component == "llm" else rest.partition(".")[2]
        if component in ("llm", "encoders") and short in expected:
            state[short] = tensor
        else:
            others[name] = tensor
    for copy, original in surgery.tied_output(whole).items():
        if original in state:
            state.pop(copy, None)  # stored twice where the two lay on different ranks
    if missing := [name for name in expected if name not in state and name not in whole.all_tied_weights_keys]:
        raise ValueError(
            f"the checkpoint is not a whole {type(whole).__name__}: {len(missing)} tensors are missing, "
            f"first {missing[0]}"
        )
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    torch.nn.Module.to(whole, max(dtypes, key=lambda dtype: dtype.itemsize))  # what its config will say
    whole.save_pretrained(output, state_dict=state)
    if others:
        save_file({name: tensor.contiguous() for name, tensor in others.items()}, output / OTHERS)
    if source is not None:
        _copy_processor(source, output)
    return list(others)


def _copy_processor(source: Path, output: Path) -> None:
    """Tokenizer, processor, chat template, generation defaults, license: all that is no weight."""
    weights = {path for pattern in WEIGHTS for path in source.glob(pattern)}
    for path in source.iterdir():
        if path.is_file() and path not in weights:
            shutil.copy2(path, output / path.name)
