"""Low-rank adapters (LoRA) in a component, through peft; and folding them into the weights that they belong to.

Needs `pip install bigmac-lightning[lora]`. Knows modules and tensors by name; knows nothing of components' kinds.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .initialization import seeded

SETTINGS = ("r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora")
_ADAPTER = "default"


def check_settings(component: str, settings: Mapping[str, Any]) -> None:
    """Refuse what could not be exported.

    Raises:
        ValueError: a setting that is missing or not known.
    """
    if unknown := settings.keys() - set(SETTINGS):
        raise ValueError(f"lora: {component!r} has {sorted(unknown)}; there are {list(SETTINGS)}")
    if missing := {"r", "target_modules"} - settings.keys():
        raise ValueError(f"lora: {component!r} needs {sorted(missing)}")


def add_lora(component: nn.Module, name: str, settings: Mapping[str, Any], seed: int = 0) -> None:
    """Put adapters into a component, in place; of its parameters they alone are trained then.

    An adapter's initial weights depend on the seed and its name only, not on which part of the component is here. It
    is float32 also where the weights beside it, which are not trained, are bfloat16.

    Args:
        component: with its weights.
        name: of the component in the model.
        settings: of peft's `LoraConfig`: "r", "target_modules" (ends of module names, or a pattern), "lora_alpha", ...
        seed: of the initial weights.

    Raises:
        ValueError: no module has such a name, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import cast_adapter_dtype
    except ImportError as problem:
        raise ValueError("lora needs peft: pip install 'bigmac-lightning[lora]'") from problem
    with torch.random.fork_rng(devices=[]):
        children = nn.Module()  # peft would take a component with a config for a model of transformers
        children._modules = component._modules
        inject_adapter_in_model(LoraConfig(**settings), children, _ADAPTER)
        cast_adapter_dtype(component, _ADAPTER)
        for path, module in component.named_modules():
            if isinstance(module, LoraLayer):
                with seeded(seed, f"{name}.{path}"):
                    module.reset_lora_parameters(_ADAPTER, init_lora_weights=True)


def fold_lora(tensors: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Tensors by the names that they have without adapters, adapters added to their weights.

    Args:
        settings: of each component with adapters, by the component's name.
    """
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, base, after = name.rpartition(".base_layer.")
        if base and after == "weight":
            (chosen,) = (s for component, s in settings.items() if name.startswith(f"{component}."))
            rank = chosen["r"]
            scale = chosen.get("lora_alpha", 8) / (rank**0.5 if chosen.get("use_rslora") else rank)
            up, down = (tensors[f"{before}.lora_{side}.{_ADAPTER}.weight"].float() for side in "BA")
            tensor = (tensor.float() + scale * (up @ down)).to(tensor.dtype)
        if ".lora_A." not in name and ".lora_B." not in name:
            folded[f"{before}.{after}" if base else name] = tensor
    return folded
