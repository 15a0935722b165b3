"""Copies of tensors on the CPU, which a thread can save while training changes the tensors themselves."""

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigmac_lightning.runtime.sharding import local

Leaves = Mapping[tuple[Any, ...], Any]
"""Values by their paths in a nested dict."""


class Copied(dict[tuple[Any, ...], Any]):
    """Copies by their paths. The next copies of the same kinds are in the same object, in place of these."""

    @cached_property
    def raw(self) -> Mapping[tuple[Any, ...], Any]:
        """The bytes of each tensor."""
        return {path: bytes_of(value) for path, value in self.items() if isinstance(value, Tensor)}


class Copies:
    """The last copies. Their memory is used again by the next ones of the same kinds, as it takes long to get memory to
    which a GPU writes while the CPU does not wait."""

    def __init__(self) -> None:
        self._kinds: dict[Any, Any] = {}
        self._made = Copied()

    def of(self, values: Leaves) -> Copied:
        """Copy these values. The copies hold until the next call."""
        tensors = {path: value for path, value in values.items() if isinstance(value, Tensor)}
        kinds = {path: kind_of(value) for path, value in tensors.items()}
        others = {path: copy.deepcopy(value) for path, value in values.items() if path not in tensors}
        if kinds != self._kinds or len(self._made) != len(values):
            self._kinds, self._made = {}, Copied()  # their memory is free before there are new ones
            self._kinds, self._made = kinds, Copied((path, _empty_like(value)) for path, value in tensors.items())
        self._made.update(others)
        made, own = [local(self._made[path]) for path in tensors], [local(tensor) for tensor in tensors.values()]
        if made:
            with torch.no_grad():
                torch._foreach_copy_(made, own, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return self._made


def kind_of(value: Any) -> Any:
    """Everything about a tensor but its numbers and where they lie."""
    if not isinstance(value, Tensor):
        return None
    return value.dtype, value.shape, value.stride(), value._spec if isinstance(value, DTensor) else None


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor's own part, as they lie in memory, which is how torch saves them. They are a view if the
    tensor is on the CPU and has its storage for itself."""
    tensor = local(tensor.detach()).cpu()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.numel() * tensor.element_size():
        storage = tensor.clone().untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # pyright: ignore[reportArgumentType]


def _empty_like(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return DTensor(_empty_like(tensor.to_local()), tensor._spec, requires_grad=False)
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
