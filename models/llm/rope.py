"""Rotary embeddings whose frequencies depend on how long a sample is (the rope types "dynamic" and "longrope").

The library's modules remember the longest row that they have seen, and take a packed row for one long sample. But in a
pipeline several stages on one rank share such a module, and microbatches go through it in any order. So here the module
forgets everything after each call, and each sample of a packed row gets its own frequencies.

Shape suffixes: B samples, S tokens.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def lengths_without_padding(module: nn.Module, tokens_BS: Tensor | None) -> Iterator[None]:
    """Within this context, the replacements among a decoder's modules do not count padding on the right of a row.

    Args:
        tokens_BS: 0 for padding; ``None``: nothing changes.
    """
    ropes = [inner for inner in module.modules() if isinstance(inner, _Stateless)]
    for rope in ropes:
        rope.tokens = tokens_BS
    try:
        yield
    finally:
        for rope in ropes:
            rope.tokens = None


@contextmanager
def frequencies_of_whole_rows(module: nn.Module, positions: Tensor, bounds: tuple[int, int]) -> Iterator[None]:
    """Within this context, the replacements among a decoder's modules get positions of slices of rows, and take their
    frequencies from the whole rows.

    Args:
        positions: the position ids of the whole rows, (B, S) or (4, B, S), text positions first.
        bounds: the first token of the slice in the whole rows, and the token after its last one.
    """
    ropes = [inner for inner in module.modules() if isinstance(inner, _Stateless)]
    for rope in ropes:
        rope.whole = positions, bounds
    try:
        yield
    finally:
        for rope in ropes:
            rope.whole = None


def _has_state(module: nn.Module) -> bool:
    inner = module if isinstance(module, nn.ModuleList) else (module,)
    return any(map(changes_with_length, inner))


def _stateless(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.ModuleList):
        return nn.ModuleList(_stateless(inner) for inner in module)
    return _Stateless(module) if changes_with_length(module) else module


class _Stateless(nn.Module):
    """A rotary embedding that starts afresh at each call, and at each sample of a packed row.

    Attributes:
        whole: if it is given the positions of a slice, those of the whole rows, and where in them the slice lies.
        tokens: (B, S), 0 for padding on the right of whole rows, which does not count.
    """

    tokens: Tensor | None = None
    whole: tuple[Tensor, tuple[int, int]] | None = None

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
        if self.whole is None:
            return self._of_rows(x, position_ids, *args, **kwargs)
        positions, (start, stop) = self.whole
        if positions.ndim != position_ids.ndim:  # the layers get text positions, or those without them
            positions = positions[0]
        elif positions.ndim == 3:
            positions = positions[-len(position_ids) :]
        whole = self._of_rows(x, positions, *args, **kwargs)
        return tuple(tensor[..., start:stop, :] for tensor in whole)

    def _of_rows(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if position_ids.ndim == 2 and is_packed(position_ids):
            samples = [[row[None, start:stop] for start, stop in sample_bounds(row)] for row in position_ids]
        elif position_ids.ndim == 2 and self.tokens is not None:
            tokens_B1 = self.tokens.long().sum(-1, keepdim=True)
            last_B1 = position_ids.gather(1, (tokens_B1 - 1).clamp(min=0))
            samples = [[row[None]] for row in position_ids.minimum(last_B1)]
        else:
            return self._fresh()(x, position_ids, *args, **kwargs)
        rows = []
        for positions in samples:
            parts = [self._fresh()(x, positions_1S, *args, **kwargs) for positions_1S in positions]
            rows.append([torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True)])
        return tuple(torch.cat(tensors) for tensors in zip(*rows, strict=True))

    def _fresh(self) -> Any:
        fresh = copy.copy(self.rope)
        fresh._buffers = {name: None if b is None else b.clone() for name, b in self.rope._buffers.items()}
        return fresh
