"""Estimates of a decoder's layers: multiplications, and numbers kept for the backward, per token.

Knows layers without weights and configs; knows nothing of stages or ranks.
"""

from typing import Any

from torch import nn

from bigmac_lightning.estimates.work import Work, attention_work

_ROUTED = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


def layer_work(layer: nn.Module, config: Any) -> Work:
    """Of a token with a layer's matrices and convolutions; of stacked experts with those alone that it is routed to.

    Args:
        config: of this layer.
    """
    total = Work()
    for module in layer.modules():
        stacked = not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            experts = parameter.shape[0] if parameter.ndim == 3 and stacked else 1
            used = min(experts, routed(config)) if experts > 1 else 1
            size = parameter.numel() / experts
            first = parameter.shape[-2] if experts > 1 else parameter.shape[0]
            total += Work(size, first + size / first) * used
    return total


def routed(config: Any) -> int:
    """The number of experts that a token is routed to."""
    return next((n for name in _ROUTED if (n := getattr(config, name, None)) is not None), 1)


def attended(config: Any, kind: str | None, sample_tokens: int) -> float:
    """Multiplications of the mean token of a sample with keys and values before it, as far as a layer looks.

    Args:
        config: of this layer.
        kind: its layer type; ``None``: the model has one kind.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not sample_tokens or not heads:
        return 0.0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    seen, window = sample_tokens / 2, getattr(config, "sliding_window", None)
    if kind in ("sliding_attention", None) and window:
        seen = min(seen, window)
    return attention_work(width, 1, seen).multiplications
