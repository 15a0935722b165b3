"""A decoder on the CPU whose layers are stubs: the library's own forward runs, and the stubs record how it calls them.

The layers' weights are never allocated, so a run takes as long for a real model as for a tiny one.

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
from ..meta_model import Names
from ..pass_through import PassThrough, hidden_of
from .handed_on import HandedOn, give_layer_inputs
from .rope import stateless_ropes
from .stage import shell_of

SHORT = 4
"""Tokens at which `StubDecoder.shorten` puts every threshold of length: fewer than the probes' samples have."""

STATE = object()
"""Stands for an argument by which layers could pass something to one another: a cache, or an empty container."""


class _StubLayer(PassThrough):
    """Stands in for a layer, or for the norm.

    Attributes:
        result: the value of all elements that a call returns; ``None``: it returns its input.
        calls: of each call, the hidden states and all other arguments by name.
        last_arguments: the positional and keyword arguments of the last call.
        order: the places of all stubs that were called, in the order of the calls; all stubs share it.
    """

    def __init__(self, instead_of: nn.Module, place: Any, order: list[Any], returned: int = 0) -> None:
        super().__init__(instead_of, returned)
        self.place, self.order = place, order
        self.result: float | None = None
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.last_arguments: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.last_arguments = args, kwargs
        hidden = hidden_of(args, kwargs)
        others = {f"argument {i}": value for i, value in enumerate(args) if i}
        others |= {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.order.append(self.place)
        self.calls.append((hidden, dict(_leaves(others))))
        return self.as_returned(hidden if self.result is None else hidden.new_tensor(self.result).expand(hidden.shape))

    def as_returned(self, hidden: Any) -> Any:
        """What comes with hidden states depends on them, so that it is seen where a decoder uses it."""
        return (hidden, *[hidden + 1] * (self.returned - 1)) if self.returned else hidden


class _StubEmbedding(nn.Module):
    """Stands in for the embedding and returns `result` for any ids."""

    result: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """Of no shape: some decoders ask on which device it is."""
        return torch.empty(0)

    def forward(self, ids: Tensor) -> Tensor | None:
        return self.result


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values inside nested containers, each with the path to it as its name."""
    if isinstance(value, Cache) or (isinstance(value, Mapping | list) and not value and name):
        yield name, STATE
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@dataclass
class StubRun:
    """What a forward did.

    Attributes:
        order: the indices of the layers, and "norm", in the order of their calls.
        hidden: the hidden states that each layer got.
        others: the other arguments of each layer, by name.
        out: what the forward returned.
    """

    order: list[Any]
    hidden: list[Any]
    others: list[dict[str, Any]]
    out: Any


class StubDecoder:
    """A decoder on the CPU with stubs for its layers and its embedding. Inputs of layers are zeros.

    The norm is replaced as well if it has parameters: a norm without parameters may be used elsewhere, too.
    """

    def __init__(self, decoder: Any, names: Names) -> None:
        order, norm = list[Any](), decoder.get_submodule(names.norm)
        layers = nn.ModuleList(_StubLayer(layer, k, order, names.returned) for k, layer in enumerate(decoder.layers))
        replaced = {"layers": layers, names.embedding: _StubEmbedding(), **stateless_ropes(decoder)}
        self.handed_on = HandedOn(decoder)
        if any(True for _ in norm.parameters()):
            replaced[names.norm] = _StubLayer(norm, "norm", order)
        self.shell: Any = copy.deepcopy(shell_of(decoder, **replaced)).eval()
        for name in (*names.with_embedding, *names.with_norm):
            self.shell.set_submodule(name, PassThrough())
        size = len(layers), self.handed_on.layer_inputs
        give_layer_inputs(self.shell, lambda h_BSD, *_: h_BSD.new_zeros(*h_BSD.shape[:-1], *size))
        allocate_and_initialize(self.shell, seed=0)
        self.config: Any = self.shell.config
        self.embedding: Any = self.shell.get_submodule(names.embedding)

    def shorten(self) -> None:
        """Let whatever changes with the length of a row (chunks, rotary frequencies) change at `SHORT` tokens."""
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
    ) -> StubRun:
        """Run the decoder's own forward.

        Args:
            h_BSD: embeddings.
            positions: position ids.
            results: for each layer, the value of all elements that it returns; ``None``: layers return their input.
            by_ids: whether the decoder gets token ids, which it has to embed itself.
            mask: the attention mask.
            further: more arguments of the decoder's forward.
        """
        layers = self.shell.layers
        order = layers[0].order
        order.clear()
        for k, layer in enumerate(layers):
            layer.calls.clear()
            layer.result = None if results is None else results[k]
        self.embedding.result = h_BSD
        ids = torch.zeros(h_BSD.shape[:2], dtype=torch.long)
        given = {"input_ids": ids} if by_ids else {"inputs_embeds": h_BSD}
        out = self.shell(**given, position_ids=positions, attention_mask=mask, use_cache=False, **further)[0]
        calls = [layer.calls[0] if layer.calls else (None, {}) for layer in layers]
        return StubRun(list(order), [hidden for hidden, _ in calls], [others for _, others in calls], out)

    def arguments_on_meta(self, layer: int) -> Any:
        """The arguments of a layer in the last run, on the meta device, where a real layer can run with them."""
        arguments = self.shell.layers[layer].last_arguments
        return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments)
