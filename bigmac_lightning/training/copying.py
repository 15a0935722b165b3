"""Copies of tensors on the CPU, which a thread can save while training changes the tensors themselves."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bigmac_lightning.runtime.sharding import local

Leaves = Mapping[tuple[Any, ...], Any]
"""Values by their paths in a nested dict."""


class Copies:
    """The last copies. Their memory is used again by the next ones of the same kinds, as it takes long to get memory to
    which a GPU writes while the CPU does not wait."""

    def __init__(self) -> None:
        self._kinds: dict[Any, Any] = {}
        self._made: dict[Any, Tensor] = {}

    def of(self, values: Leaves) -> Leaves:
        """Copy these values. The copies hold until the next call."""
        tensors = {path: value for path, value in values.items() if isinstance(value, Tensor)}
        kinds = {path: kind_of(value) for path, value in tensors.items()}
        if kinds != self._kinds:
            self._kinds, self._made = {}, {}  # their memory is free before there are new ones
            self._kinds, self._made = kinds, {path: _empty_like(value) for path, value in tensors.items()}
        made, own = ([local(tensor) for tensor in found.values()] for found in (self._made, tensors))
        if made:
            with torch.no_grad():
                torch._foreach_copy_(made, own, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return {path: self._made[path] if path in tensors else copy.deepcopy(value) for path, value in values.items()}


def kind_of(value: Any) -> Any:
    """Everything about a tensor but its numbers and where they lie."""
    if not isinstance(value, Tensor):
        return None
    return value.dtype, value.shape, value.stride(), value._spec if isinstance(value, DTensor) else None


def _empty_like(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return DTensor(_empty_like(tensor.to_local()), tensor._spec, requires_grad=False)
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
