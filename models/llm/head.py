"""The head of a model, run by the library's own forward: from final hidden states to logits, and to the library's load
balancing loss, to compare with. Knows models without what is below their output weight; knows nothing of stages.

Shape suffixes: T tokens, L labelled positions, D width, V vocabulary, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from .stage import shell_of


def logits_of(whole: Any, decoder_name: str, h_LD: Tensor) -> Tensor:
    """logits_LV with soft caps, scales and a bias, if there are any."""
    head = shell_of(whole, **{decoder_name.partition(".")[0]: _Below()})
    return head(inputs_embeds=h_LD[None], use_cache=False).logits[0]


def check_plain(whole: Any, decoder_name: str, output_name: str) -> None:
    """
    Args:
        whole: a model, with or without weights.
        decoder_name, output_name: of its decoder and of its output layer.

    Raises:
        ValueError: logits are more than hidden states times the output weight.
    """
    with torch.no_grad(), torch.device("cpu"):
        h_LD = torch.linspace(-9, 9, 8, dtype=torch.float32)[None]
        bare = shell_of(whole, **{output_name: nn.Identity()})
        if whole.get_output_embeddings().bias is None and torch.equal(logits_of(bare, decoder_name, h_LD), h_LD):
            return
    raise ValueError(
        f"fused_loss: the logits of model_type {whole.config.model_type!r} are not those of its output weight "
        "alone (a soft cap, a scale, a bias): leave it out"
    )


def library_router_loss(
    whole: Any, decoder_name: str, output_name: str, logits_TE: Sequence[Tensor], mask: Tensor
) -> Tensor | None:
    """The load balancing loss that the library makes of the logits of some routers; ``None``: it makes none.

    Args:
        whole: a model, without weights.
        decoder_name, output_name: of its decoder and of its output layer.
        mask: (1, T), 0 for tokens that do not count.
    """
    below = _Below(tuple(logits_TE))
    shell = shell_of(whole, **{decoder_name.partition(".")[0]: below, output_name: nn.Identity()})
    h_1TD = torch.zeros(*mask.shape, 1, dtype=torch.float32)
    out = shell(inputs_embeds=h_1TD, attention_mask=mask, use_cache=False, output_router_logits=True)
    return getattr(out, "aux_loss", None)


@dataclass
class _Final(ModelOutput):
    """What a model without its head returns, as far as the head asks for it."""

    last_hidden_state: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> None:
        return None


class _Below(nn.Module):
    """Stands for all below the output weight: the hidden states are final already."""

    def __init__(self, router_logits: tuple[Tensor, ...] | None = None) -> None:
        super().__init__()
        self.router_logits = router_logits

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _Final:
        return _Final(last_hidden_state=inputs_embeds, router_logits=self.router_logits)
