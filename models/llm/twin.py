"""A decoder's own forward on the CPU, with stand-ins for its layers that note what they are called with.

No layer's weights are needed, so that it takes as long for a real model as for a tiny one. Knows decoders with
`layers`, an embedding and a norm; judges nothing.

Shape suffixes: B samples, S tokens, D width.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import Cache

from ..initialization import allocate_and_initialize
from ..surgery import Names, PassThrough
from .rope import stateless_ropes
from .stage import hidden_of, shell_of

SHORT = 4  # tokens


class _StandIn(PassThrough):
    """Stands for a layer, or for the norm.

    Attributes:
        result: what it returns; ``None``: what it gets.
        calls: hidden states, and all other arguments by name.
        given: the arguments of the last call.
        order: of all calls, also of others.
    """

    def __init__(self, instead_of: nn.Module, place: Any, order: list[Any]) -> None:
        super().__init__(instead_of)
        self.place, self.order = place, order
        self.result: Tensor | None = None
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.given: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args, kwargs
        hidden = hidden_of(args, kwargs)
        others = {f"argument {i}": value for i, value in enumerate(args) if i}
        others |= {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.order.append(self.place)
        self.calls.append((hidden, dict(_leaves(others))))
        return hidden if self.result is None else self.result


class _Embedding(nn.Module):
    """Stands for the embedding: returns what it was told to."""

    result: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor | None:
        return self.result


STATE = object()
"""Stands for an argument by which layers could tell one another something."""


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is inside nested containers, each with a name."""
    if isinstance(value, Cache) or (isinstance(value, Mapping | list) and not value and name):
        yield name, STATE
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@dataclass
class Run:
    """What a forward did.

    Attributes:
        order: layers, and the norm, as they were called.
        hidden: what went into each layer.
        others: its other arguments by name.
        out: what came out at the end.
    """

    order: list[Any]
    hidden: list[Any]
    others: list[dict[str, Any]]
    out: Any


class Twin:
    """A decoder on the CPU, with stand-ins for its layers."""

    def __init__(self, decoder: Any, names: Names) -> None:
        order, norm = list[Any](), decoder.get_submodule(names.norm)
        layers = nn.ModuleList(_StandIn(layer, k, order) for k, layer in enumerate(decoder.layers))
        replaced = {"layers": layers, names.embedding: _Embedding(), **stateless_ropes(decoder)}
        if any(True for _ in norm.parameters()):
            replaced[names.norm] = _StandIn(norm, "norm", order)
        self.shell: Any = copy.deepcopy(shell_of(decoder, **replaced)).eval()
        allocate_and_initialize(self.shell, seed=0)
        self.config: Any = self.shell.config
        self.embedding: Any = self.shell.get_submodule(names.embedding)

    def shorten(self) -> None:
        """Make what changes at some length change at a few tokens."""
        for name in ("attention_chunk_size", "original_max_position_embeddings"):
            if getattr(self.config, name, None):
                setattr(self.config, name, SHORT)
        for module in self.shell.modules():
            if hasattr(module, "original_max_seq_len"):
                module.original_max_seq_len = module.max_seq_len_cached = SHORT
        ropes = getattr(self.config, "rope_parameters", None) or {}
        for rope in (ropes, *ropes.values()):
            if isinstance(rope, dict) and "original_max_position_embeddings" in rope:
                rope["original_max_position_embeddings"] = SHORT

    def run(
        self,
        h_BSD: Tensor,
        positions: Tensor,
        results: list[float] | None = None,
        by_ids: bool = False,
        mask: Any = None,
        **further: Any,
    ) -> Run:
        """
        Args:
            h_BSD: embeddings.
            positions: position ids.
            results: what each layer returns, in all of its elements; ``None``: what it gets.
            by_ids: let the decoder embed token ids itself.
            mask: attention mask.
            further: arguments of the decoder's forward.
        """
        layers = self.shell.layers
        order = layers[0].order
        order.clear()
        for k, layer in enumerate(layers):
            layer.calls.clear()
            layer.result = None if results is None else h_BSD.new_tensor(results[k]).expand(h_BSD.shape)
        self.embedding.result = h_BSD
        ids = torch.zeros(h_BSD.shape[:2], dtype=torch.long)
        given = {"input_ids": ids} if by_ids else {"inputs_embeds": h_BSD}
        out = self.shell(**given, position_ids=positions, attention_mask=mask, use_cache=False, **further)[0]
        calls = [layer.calls[0] if layer.calls else (None, {}) for layer in layers]
        return Run(list(order), [hidden for hidden, _ in calls], [others for _, others in calls], out)

    def given_on_meta(self, layer: int) -> Any:
        """The arguments of a layer in the last run, to run a real layer without values."""
        return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), self.shell.layers[layer].given)
