"""What the layers of some decoders hand on beside hidden states of one stream, which then travels from stage to stage.

Three kinds are known, all of Gemma 3n and Gemma 4: keys and values that later layers use again; inputs of every layer,
made of token ids and embeddings; and hidden states of several streams (AltUp, arXiv 2301.13310).

Shape suffixes: B samples, S tokens, D width, L layers, P values of an input, H heads, K values of a key.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

STREAMS = "streams"
LAYER_INPUTS = "layer_inputs"
SHARED_KEYS = "shared_kv_states"
"""The argument by which the library's layers share keys and values: a dict by types of layers."""


@dataclass
class Between:
    """What goes from one layer to the next.

    Attributes:
        hidden: hidden states (B, S, D); of several streams (streams, B, S, D). Before the first layer: embeddings.
        keys: by the type of layer, keys and values (B, H, S, K) that later layers use. With a cache, what comes out of
            a stage has those of earlier tokens before them.
        layer_inputs: the inputs of all layers, (B, S, L, P); those of earlier layers may have any values.
    """

    hidden: Tensor
    keys: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    layer_inputs: Tensor | None = None


@dataclass(frozen=True)
class _SharedKeys:
    """Keys and values that several layers use: the layer that makes them, the last that uses them, and their H, K."""

    made: int
    last: int
    heads: int
    size: int

    def cross(self, layer: int) -> bool:
        """Whether they go into a layer from the one before."""
        return self.made < layer <= self.last


class HandedOn:
    """What the layers of a decoder hand on beside hidden states of one stream. It is false if that is nothing.

    Attributes:
        streams: the number of streams of hidden states.
        layer_inputs: P; 0: layers have no inputs of their own.
        shares_keys: whether it is known of every layer which keys and values it shares with others, or that it does
            not.
    """

    def __init__(self, decoder: Any) -> None:
        """
        Args:
            decoder: a decoder of the library, with all of its layers.
        """
        self._layers = len(decoder.layers)
        attentions = [
            next((m for m in layer.modules() if hasattr(m, "is_kv_shared_layer")), None) for layer in decoder.layers
        ]
        self.shares_keys = None not in attentions
        self._keys = _shared_keys(attentions) if self.shares_keys else {}
        self.layer_inputs: int = getattr(decoder, "hidden_size_per_layer_input", 0) or 0
        self.streams = len(getattr(decoder, "altup_projections", ())) + 1

    def __bool__(self) -> bool:
        return bool(self._keys) or bool(self.layer_inputs) or self.streams > 1

    def made_before(self, layer: int) -> dict[str, int]:
        """By type of layer, the layer whose keys and values go into a later layer from the one before."""
        return {kind: keys.made for kind, keys in self._keys.items() if keys.cross(layer)}

    def shapes(
        self, layer: int, rows: tuple[int, int], width: int, tensor_ranks: int = 1
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what goes as extras into a layer.

        Args:
            rows: B and S.
            width: D.
            tensor_ranks: number of ranks that share the heads of keys and values. Those of one stage send theirs to
                those of equal place in the next.
        """
        made: dict[str, tuple[int, ...]] = {}
        if self.streams > 1:
            made[STREAMS] = (self.streams - 1, *rows, width)
        if self.layer_inputs:
            made[LAYER_INPUTS] = (*rows, self._layers - layer, self.layer_inputs)
        for kind, keys in self._keys.items():
            if keys.cross(layer):
                made[f"keys.{kind}"] = (2, rows[0], keys.heads // tensor_ranks, rows[1], keys.size)
        return made

    def taken(self, h_BSD: Tensor, extras: dict[str, Tensor], layer: int) -> Between:
        """What goes into a layer after the first, of hidden states and extras, which are taken out."""
        between = Between(h_BSD)
        if self.streams > 1:
            between.hidden = torch.cat([h_BSD[None], extras.pop(STREAMS)])
        if self.layer_inputs:
            between.layer_inputs = nn.functional.pad(extras.pop(LAYER_INPUTS), (0, 0, layer, 0))
        for kind, keys in self._keys.items():
            if keys.cross(layer):
                key, value = extras.pop(f"keys.{kind}").unbind()
                between.keys[kind] = key, value
        return between

    def handed(self, between: Between, extras: dict[str, Tensor], layer: int) -> Tensor:
        """Hidden states that go into a layer; what goes with them is put into the extras."""
        if self.layer_inputs:
            assert between.layer_inputs is not None
            extras[LAYER_INPUTS] = between.layer_inputs[:, :, layer:]
        for kind, keys in self._keys.items():
            if keys.cross(layer):
                new = between.hidden.shape[-2]  # the next stage keeps those of earlier tokens itself
                extras[f"keys.{kind}"] = torch.stack([one[:, :, -new:] for one in between.keys[kind]])
        if self.streams == 1:
            return between.hidden
        extras[STREAMS] = between.hidden[1:]
        return between.hidden[0]


def give_layer_inputs(shell: Any, made: Callable[..., Tensor | None]) -> None:
    """Let a copy of a decoder take its layers' inputs from a function of the embeddings (and more arguments)."""
    shell.project_per_layer_inputs = made
    shell.get_per_layer_inputs = lambda *given: None


def _shared_keys(attentions: list[Any]) -> dict[str, _SharedKeys]:
    """By type of layer, the keys and values that layers share."""
    made: dict[str, _SharedKeys] = {}
    for k, attention in enumerate(attentions):
        if attention.is_kv_shared_layer:
            made[attention.layer_type] = _SharedKeys(**{**vars(made[attention.layer_type]), "last": k})
        elif attention.store_full_length_kv:
            size = attention.head_dim
            made[attention.layer_type] = _SharedKeys(k, k, attention.k_proj.weight.shape[0] // size, size)
    return {kind: keys for kind, keys in made.items() if keys.last > keys.made}
