"""Weights of which a process makes only its rows, because they will lie in shards on several ranks.

Rows are a part of a weight's first dimension, the one that torch's `fully_shard` leaves to this rank: a DTensor that
has the shape of the whole weight. What makes and reads them is below; they become shards when a run begins.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

FILE = "diffusion_pytorch_model.safetensors"
"""The file in which diffusers saves weights, or what its index for several files begins with."""


def bounds_of(whole: Tensor, mesh: DeviceMesh) -> tuple[int, int]:
    """The first of this rank's rows of a weight, and the one after the last."""
    number, first = Shard.local_shard_size_and_offset(len(whole), mesh.size(), mesh.get_local_rank())
    first = first if number else 0
    return first, first + number


def cut_rows(
    whole: nn.Module,
    mesh: DeviceMesh,
    inside: str = "",
    stays: Callable[[str, Tensor], bool] = lambda name, weight: False,
) -> None:
    """Replace the parameters of a module by this rank's rows of them, one by one. Nothing is sent.

    Args:
        whole: a model whose parameters are the same on all ranks, or without memory.
        inside: the name of the module in it whose parameters are cut; all by default.
        stays: tells for a parameter and its name in the model whether it stays whole.
    """
    made: dict[int, nn.Parameter] = {}  # a parameter may have several places
    for path, module in whole.get_submodule(inside).named_modules(prefix=inside):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.ndim == 0 or not parameter.is_contiguous():
                continue
            if isinstance(parameter, DTensor):
                _release(parameter)
            elif not stays(_joined(path, name), parameter):
                if id(parameter) not in made:
                    made[id(parameter)] = _rows(parameter, mesh)
                module._parameters[name] = made[id(parameter)]


def _rows(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    start, stop = bounds_of(parameter, mesh)
    local = parameter.detach()[start:stop].clone()
    return nn.Parameter(_placed(local, parameter, mesh), parameter.requires_grad)


def _placed(local: Tensor, whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows as a part of the whole, on the mesh's device."""
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _release(rows: DTensor) -> None:
    """Let rows have memory of their own, so that the whole tensor, of which they are a view, can be freed."""
    local = rows._local_tensor
    if not local.is_meta and local.untyped_storage().nbytes() > local.nbytes:
        rows._local_tensor = local.clone()


class DrawnAgainError(Exception):
    """Weights that have been cut were to be written once more."""


class Once(TorchFunctionMode):
    """Within this context, weights that have been cut cannot be written: rows of them would get random numbers that
    whole weights would not.

    Raises:
        DrawnAgainError: they were to be written.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and name != "requires_grad_" and any(isinstance(arg, DTensor) for arg in (*args, *kwargs.values())):
            raise DrawnAgainError(name)
        return func(*args, **kwargs)


def constructed(build: Callable[[], Any], mesh: DeviceMesh) -> Any:
    """A model whose constructor draws its weights. Each module in it is cut when it becomes the child of another one.

    Raises:
        DrawnAgainError: the constructor writes to weights of a module once more, so it can only draw all of them whole.
    """

    def cut(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            cut_rows(child, mesh)

    hook = register_module_module_registration_hook(cut)
    try:
        with Once():
            made = build()
    finally:
        hook.remove()
    cut_rows(made, mesh)
    return made


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made within this context have parameters without memory, and buffers with their values."""

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:  # one that is registered once more stays the same one
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(drop)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_rows(build: Callable[[], Any], source: str, mesh: DeviceMesh) -> Any:
    """A diffusers model with float32 weights from a folder, of which this rank's rows are read.

    Args:
        build: constructs the model.
        source: the folder.

    Returns: ``None`` if the folder has no safetensors, or other tensors than the model: the library knows what to do
        then, or what to say.
    """
    with _parameters_on_meta(), _default_dtype(torch.float32):
        model = build()
    places, own = _places(Path(source)), model.state_dict()
    if places is None or places.keys() != own.keys():
        return None
    files: dict[str, Any] = {file: safe_open(str(Path(source) / file), "pt") for file in set(places.values())}
    slices = {name: files[file].get_slice(name) for name, file in places.items()}
    if any(tuple(slices[name].get_shape()) != tuple(tensor.shape) for name, tensor in own.items()):
        return None
    cut_rows(model, mesh)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _read(parameter, slices[_joined(path, name)])
        for name, buffer in module._buffers.items():
            if buffer is not None and _joined(path, name) in slices:
                buffer.copy_(slices[_joined(path, name)][...])
    return model


def _read(parameter: nn.Parameter, stored: Any) -> nn.Parameter:
    """A parameter with its values, or this rank's rows of them."""
    if not isinstance(parameter, DTensor):
        return nn.Parameter(stored[...].to(parameter.dtype, copy=True), parameter.requires_grad)
    start, stop = bounds_of(parameter, parameter.device_mesh)
    local = stored[start:stop].to(parameter.dtype, copy=True)
    made = _placed(local, parameter, parameter.device_mesh)
    return nn.Parameter(made, parameter.requires_grad)


def _places(folder: Path) -> Mapping[str, str] | None:
    """The file of each tensor in a folder of diffusers; ``None`` if it has no safetensors."""
    index = folder / f"{FILE}.index.json"
    if index.exists():
        return json.loads(index.read_text("utf-8"))["weight_map"]
    if not (folder / FILE).exists():
        return None
    with safe_open(str(folder / FILE), "pt") as file:
        return dict.fromkeys(file.keys(), FILE)
