"""Estimates of a decoder's layers per token, from their parameters on the meta device and their configs."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from bigmac_lightning.estimates.forward_cost import ForwardCost, attention_cost

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""The names under which the configs of transformers have it."""


Cuts = Mapping[nn.Parameter, tuple[int, int]]
"""Of each parameter that lies in slices: the dimension that is cut, counted from the last one (-1), and into how many
slices."""


def layer_cost(layer: nn.Module, config: Any, cuts: Cuts = MappingProxyType({})) -> ForwardCost:
    """The cost per token of a layer's matrices and convolutions. Of stacked experts, only those count that a token is
    routed to.

    Args:
        layer: a layer on the meta device.
        config: the config of this layer.
        cuts: which parameters lie in slices: the cost is then that of a rank that has one slice of each. Where experts
            are spread, a rank computes some of those that a token is routed to; but its tensors have a row for each.
    """
    total = ForwardCost()
    for module in layer.modules():
        stacked = not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            experts = parameter.shape[0] if parameter.ndim == 3 and stacked else 1
            used = min(experts, experts_per_token(config)) if experts > 1 else 1
            size = parameter.numel() / experts
            first = parameter.shape[-2] if experts > 1 else parameter.shape[0]
            dimension, slices = cuts.get(parameter, (-1, 1))
            experts_apart = slices if dimension < -2 else 1
            sides = [first, size / first]
            if experts_apart == 1:
                sides[dimension] /= slices
            total += ForwardCost(sides[0] * sides[1] * used / experts_apart, sum(sides) * used)
    return total


def experts_per_token(config: Any) -> int:
    """The number of experts that a token is routed to; 1 for a config without experts."""
    return next((n for name in _EXPERTS_PER_TOKEN if (n := getattr(config, name, None)) is not None), 1)


def matrix_costs(
    layers: Iterable[nn.Module], configs: Sequence[Any], cuts: Cuts = MappingProxyType({})
) -> list[ForwardCost]:
    """The `layer_cost` of each layer.

    Args:
        configs: the config of each layer.
    """
    return [layer_cost(layer, config, cuts) for layer, config in zip(layers, configs, strict=True)]


def layer_multiplications(
    matrices: Sequence[ForwardCost], configs: Sequence[Any], text: Any, sample_tokens: int, heads: int = 1
) -> tuple[float, ...]:
    """The multiplications per token of each layer.

    Args:
        matrices: what `matrix_costs` returns.
        configs: the config of each layer.
        text: the config of the decoder.
        sample_tokens: the length of a sample; 0: leave attention out.
        heads: the number of ranks that share the heads of attention.
    """
    kinds = getattr(text, "layer_types", None) or [None] * len(matrices)
    return tuple(
        cost.multiplications + attention_multiplications(config, kind, sample_tokens) / heads
        for cost, config, kind in zip(matrices, configs, kinds, strict=True)
    )


def attention_multiplications(config: Any, kind: str | None, sample_tokens: int) -> float:
    """The multiplications of causal attention for the mean token of a sample, which sees half of the sample, or the
    sliding window where that is shorter.

    Args:
        config: the config of the layer.
        kind: the layer's type; ``None``: the model has layers of one type.
        sample_tokens: the length of the sample; 0: leave attention out.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not sample_tokens or not heads:
        return 0.0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    seen, window = sample_tokens / 2, getattr(config, "sliding_window", None)
    if kind in ("sliding_attention", None) and window:
        seen = min(seen, window)
    return attention_cost(width, 1, seen).multiplications
