"""Rotary embeddings whose frequencies depend on how long a sample is (the rope types "dynamic" and "longrope").

The library's modules remember the longest row that they have seen, and take a packed row for one long sample. But in a
pipeline several stages on one rank share such a module, and microbatches go through it in any order. So here the module
forgets everything after each call, and each sample of a packed row gets its own frequencies.

Shape suffixes: B samples, S tokens.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .attention import is_packed, sample_bounds


def stateless_ropes(module: nn.Module) -> dict[str, nn.Module]:
    """Replacements for those children of a decoder that are, or hold, such a rotary embedding."""
    return {name: _stateless(child) for name, child in module.named_children() if _has_state(child)}


def changes_with_length(module: nn.Module) -> bool:
    """Whether a module is such a rotary embedding."""
    kind = str(getattr(module, "rope_type", ""))  # a string, or a dict with one for each layer type
    return "dynamic" in kind or "longrope" in kind


def _has_state(module: nn.Module) -> bool:
    inner = module if isinstance(module, nn.ModuleList) else (module,)
    return any(map(changes_with_length, inner))


def _stateless(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.ModuleList):
        return nn.ModuleList(_stateless(inner) for inner in module)
    return _Stateless(module) if changes_with_length(module) else module


class _Stateless(nn.Module):
    """A rotary embedding that starts afresh at each call, and at each sample of a packed row."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.rope, name)

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """
        Args:
            x: a tensor with the type and the device that the result is to have.
            position_ids: (B, S), or (3, B, S).
        """
        if position_ids.ndim != 2 or not is_packed(position_ids):
            return self._fresh()(x, position_ids, *args, **kwargs)
        rows = []
        for row in position_ids:
            parts = [self._fresh()(x, row[None, start:stop], *args, **kwargs) for start, stop in sample_bounds(row)]
            rows.append([torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True)])
        return tuple(torch.cat(tensors) for tensors in zip(*rows, strict=True))

    def _fresh(self) -> Any:
        fresh = copy.copy(self.rope)
        fresh._buffers = {name: None if b is None else b.clone() for name, b in self.rope._buffers.items()}
        return fresh
