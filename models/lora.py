"""Low-rank adapters (LoRA, arXiv 2106.09685) in a component, made by peft; and folding them into the weights.

Which layers get adapters is decided on the whole component, before a process drops what it does not hold: patterns must
mean the same on all ranks. Adapters need `pip install bigmac-lightning[lora]`.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .initialization import seeded

OPTIONS = ("r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora")
"""The options of peft's `LoraConfig` that are supported."""
_ADAPTER = "default"
"""The name by which peft has an adapter if it is given none."""
ALPHA = 8
"""peft's default of lora_alpha."""


def targets_of(component: nn.Module, name: str, options: Mapping[str, Any]) -> frozenset[str]:
    """The names in a component of the linear layers that get adapters.

    Args:
        component: the whole component, with or without weights.
        name: the name of the component in the model.
        options: see `add_lora`.

    Raises:
        ValueError: an option is missing or not known, or a target is no layer, or a layer that cannot have an adapter.
    """
    if unknown := options.keys() - set(OPTIONS):
        raise ValueError(f"lora: {name!r} has {sorted(unknown)}; there are {list(OPTIONS)}")
    if missing := {"r", "target_modules"} - options.keys():
        raise ValueError(f"lora: {name!r} needs {sorted(missing)}")
    wanted, found = options["target_modules"], set[str]()
    modules, parameters = dict(component.named_modules()), dict(component.named_parameters())
    for target in [wanted] if isinstance(wanted, str) else wanted:
        meant = [path for path in (*modules, *parameters) if _is_meant(path, target, isinstance(wanted, str))]
        names = {path for path in meant if type(modules.get(path)) is nn.Linear}
        for path in meant:
            if path not in names and path.rpartition(".")[0] not in names:
                kind = type(modules[path]).__name__ if path in modules else "weight of experts or the like"
                raise ValueError(
                    f"lora: {target!r} of {name!r} means {path}, too, a {kind}: only linear layers can have adapters. "
                    f"Name them more closely; there are {_ends(modules)}"
                )
        if not names:
            raise ValueError(f"lora: {name!r} has no layer {target!r}; there are {_ends(modules)}")
        found.update(names)
    return frozenset(found)


def _is_meant(path: str, target: str, is_pattern: bool) -> bool:
    """Whether a target means a name, by peft's rules: a string is a pattern for whole names, an item of a list the end
    of a name."""
    return bool(re.fullmatch(target, path)) if is_pattern else f".{path}".endswith(f".{target}")


def _ends(modules: Mapping[str, nn.Module]) -> list[str]:
    """The last parts of the names of linear layers."""
    return sorted({path.rpartition(".")[2] for path, module in modules.items() if type(module) is nn.Linear})


def add_lora(
    component: nn.Module, name: str, options: Mapping[str, Any], targets: Collection[str], seed: int = 0
) -> None:
    """Put adapters into the part of a component that a process holds, in place. Only the adapters are trained then.

    An adapter's initial weights depend on the seed and its name only, not on which part of the component is here. It is
    float32 also where the weights beside it, which are not trained, are bfloat16.

    Args:
        component: a component with its weights.
        name: the name of the component in the model.
        options: arguments of peft's `LoraConfig`: "r", "target_modules" (ends of module names, or a pattern),
            "lora_alpha", ...
        targets: the targets in the whole component, from `targets_of`.
        seed: the seed of the initial weights.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import cast_adapter_dtype
    except ImportError as problem:
        raise ValueError("lora needs peft: pip install 'bigmac-lightning[lora]'") from problem
    component.requires_grad_(False)
    here = [path for path, module in component.named_modules() if path in targets and isinstance(module, nn.Linear)]
    if not here:  # all targets are on other ranks
        return
    config = LoraConfig(**{**options, "target_modules": "|".join(map(re.escape, here))})
    with torch.random.fork_rng(devices=[]), _whole_shapes(component):
        children = nn.Module()  # peft would take a component that has a config for a model of transformers
        children._modules = component._modules
        inject_adapter_in_model(config, children, _ADAPTER)
        cast_adapter_dtype(component, _ADAPTER)
        for path, module in component.named_modules():
            if isinstance(module, LoraLayer):
                with seeded(seed, f"{name}.{path}"):
                    module.reset_lora_parameters(_ADAPTER, init_lora_weights=True)


@contextmanager
def _whole_shapes(component: nn.Module) -> Iterator[None]:
    """Within this context weights in slices are replaced by ones of their whole shape that take no memory: peft gives
    adapters the shape of a slice, but they are made whole, with the same numbers on all ranks, and cut afterwards."""
    slices = [(m, n, p) for m in component.modules() for n, p in m._parameters.items() if isinstance(p, DTensor)]
    try:
        for module, name, weight in slices:
            stand_in = torch.empty(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
            module._parameters[name] = nn.Parameter(stand_in, requires_grad=False)
        yield
    finally:
        for module, name, weight in slices:
            module._parameters[name] = weight


def adapters_in(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """The tensors of adapters: the name of the layer in the model, "lora_A" or "lora_B", and the tensor."""
    for name, tensor in tensors.items():
        for side in ("lora_A", "lora_B"):
            layer, found, _ = name.partition(f".{side}.{_ADAPTER}.")
            if found:
                yield layer, side, tensor


def fold_lora(tensors: Mapping[str, Tensor], options: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Add adapters to the weights beside them; returns tensors by the names that they have without adapters.

    Args:
        tensors: the tensors of a model by name.
        options: the options of each component with adapters, by the component's name.
    """
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, base, after = name.rpartition(".base_layer.")
        if base and after == "weight":
            (own,) = (o for component, o in options.items() if name.startswith(f"{component}."))
            rank = own["r"]
            # rsLoRA (arXiv 2312.03732) divides by the root of the rank
            scale = own.get("lora_alpha", ALPHA) / (rank**0.5 if own.get("use_rslora") else rank)
            exact = torch.promote_types(tensor.dtype, torch.float32)
            up, down = (tensors[f"{before}.lora_{side}.{_ADAPTER}.weight"].to(exact) for side in "BA")
            tensor = (tensor.to(exact) + scale * (up @ down)).to(tensor.dtype)
        if ".lora_A." not in name and ".lora_B." not in name:
            folded[f"{before}.{after}" if base else name] = tensor
    return folded
