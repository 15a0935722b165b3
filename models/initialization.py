"""Configs, and initial weights that depend on a seed and a name only.

They never depend on the order of construction, the device, the global random state, or on which part of a model this
process holds.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, dynamic_module_utils

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.contracts.remote_code import without_asking

from .pass_through import PassThrough

AnyModule = TypeVar("AnyModule", bound=nn.Module)
TRUST = (
    "set trust_remote_code=True in HFDecoder or MultimodalLM.from_pretrained; encoders run only models that "
    "transformers has itself"
)
"""What a user has to do who trusts the code of a pretrained model."""


def frozen_as(other: nn.Module, module: AnyModule) -> AnyModule:
    """Freeze the parameters of a module that are frozen in another one, whose place it takes; returns the module."""
    for name, parameter in other.named_parameters():
        module.get_parameter(name).requires_grad_(parameter.requires_grad)
    return module


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """What the block draws on the CPU depends on (seed, name) only, and the random state outside does not change.

    New tensors are made on the CPU, whatever the default device is.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(
            int.from_bytes(digest[:8], "big") >> 1
        )  # torch.manual_seed would set CUDA's, too
        yield


def allocate_and_initialize(
    model: PreTrainedModel, seed: int, finish: Callable[[str], None] = lambda name: None
) -> None:
    """Give a model that was built on the meta device weights and buffers on the CPU, in place.

    Every submodule gets the initial values that its own Hugging Face class gives it, drawn from (seed, its name). So a
    part of a model gets the weights that it has in the whole model. Non-persistent buffers, such as rotary frequencies,
    are made anew as well. Tied parameters are untied.

    Args:
        finish: gets the name of each module once it and all that is in it have their values. No memory is taken for
            the modules that come after it.

    Raises:
        ValueError: the class of some module has no rule for one of its parameters or buffers.
    """
    owners: dict[str, PreTrainedModel] = {}  # the innermost model around a module, as a vision tower has its own rules
    for name, module in model.named_modules():
        around = owners[name.rpartition(".")[0]] if name else model
        owners[name] = module if isinstance(module, PreTrainedModel) else around
    left: list[tuple[str, nn.Module]] = []
    for name, module in reversed(list(model.named_modules())):  # children first, as Hugging Face does
        module.to_empty(device="cpu", recurse=False)
        for tensor in _own_tensors(module).values():
            tensor.data.fill_(torch.nan)  # so that what no rule sets is found below; it would be any memory
        own = module._parameters.values()
        if not own or any(parameter is not None for parameter in own):  # rules do not expect dropped parameters
            with seeded(seed, name), torch.no_grad():
                owners[name]._init_weights(_without_dropped(module))
                if _is_unset(module) and not _initialize_as_constructed(module):
                    left.append((name, module))  # the rule of a module around it may set it yet
        finish(name)
    if unset := [name for name, module in left if _is_unset(module)]:
        raise ValueError(
            f"{type(model).__name__} has no rule for the initial values of {unset[0]}: start from the weights of a "
            "checkpoint (weights: DIR)"
        )


def _without_dropped(module: nn.Module) -> nn.Module:
    """The module, whose lists lack layers that were dropped: a rule may set something in each layer (Falcon-H1)."""
    lists = {name: child for name, child in module.named_children() if isinstance(child, nn.ModuleList)}
    if not any(isinstance(layer, PassThrough) for layers in lists.values() for layer in layers):
        return module
    seen = copy.copy(module)
    kept = {name: nn.ModuleList(x for x in layers if not isinstance(x, PassThrough)) for name, layers in lists.items()}
    seen._modules = {**module._modules, **kept}
    return seen


def _is_unset(module: nn.Module) -> bool:
    return any(tensor.isnan().any() for tensor in _own_tensors(module).values())


def _initialize_as_constructed(module: nn.Module) -> bool:
    """Give a module the values that its constructor sets, as no rule of its model does (xIELU, an activation).

    Returns: whether that is possible. It is not if the constructor needs arguments, which are not known.
    """
    try:
        made = _own_tensors(type(module)())
    except TypeError:
        return False
    own = _own_tensors(module)
    if {n: t.shape for n, t in made.items()} != {n: t.shape for n, t in own.items()}:
        return False
    for key, tensor in own.items():
        tensor.data.copy_(made[key])  # in the type that the model gave it
    return True


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _check_folder(name: str) -> None:
    """Check what can be checked of a pretrained model without asking the Hub for it.

    Raises:
        FileNotFoundError: there is no such folder, or it has no config.json.
    """
    place = Path(name).expanduser()
    if place.is_dir() and not (place / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no config.json in the folder {name}: give one that save_pretrained has written, or download it"
        )
    local = place.is_absolute() or name.startswith(".") or name.count("/") > 1
    if not place.exists() and (local or ("/" in name and place.parent.is_dir())):
        raise FileNotFoundError(f"there is no folder {name} (the current folder is {Path.cwd()})")


def to_config(config: dict[str, Any] | str | PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A transformers config from a dict with `model_type`, or from the folder or name of a pretrained model.

    Args:
        trust_remote_code: whether code of the pretrained model may run.

    Raises:
        ValueError: transformers has no such model, does not accept the config, or would have to run code of the model.
        OSError: there is no such folder, or it has no config.json.
    """
    if isinstance(config, PreTrainedConfig):
        return config
    if isinstance(config, str):
        config = local_folder(config)
        _check_folder(config)
        with without_asking(config, TRUST, dynamic_module_utils):
            return AutoConfig.from_pretrained(config, trust_remote_code=trust_remote_code)
    if "model_type" not in config:
        raise ValueError('the config needs a "model_type", for example {"model_type": "qwen3", "hidden_size": 64}')
    try:
        return AutoConfig.for_model(**config)
    except Exception as error:
        raise ValueError(
            f"transformers takes no such config of model_type {config['model_type']!r} "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
