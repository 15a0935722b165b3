"""What lies above a decoder, run by the model's own forward: logits, and the library's load balancing loss.

The decoder is replaced by a module that returns ready results, so no weights but the output layer's are needed.

Shape suffixes: T tokens, L labelled positions, D width, V vocabulary, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..meta_model import Names, output_layer
from ..pass_through import PassThrough
from .stage import shell_of


def logits_of(whole: Any, names: Names, h_LD: Tensor) -> Tensor:
    """logits_LV of final hidden states, with the model's soft cap, scale and bias, if it has them."""
    model, below, _ = _with_head(whole, names)
    head = shell_of(model, **{below: _ReadyDecoder(model.get_submodule(below))})
    return head(inputs_embeds=h_LD[None], use_cache=False).logits[0]


def check_plain(whole: Any, names: Names) -> None:
    """Checks that fused losses, which use the output weight alone, compute the model's own loss.

    Args:
        whole: a model with or without weights.
        names: the names of its parts.

    Raises:
        ValueError: logits are something else than hidden states times the output weight.
    """
    with torch.no_grad(), torch.device("cpu"):
        h_LD = torch.linspace(-9, 9, 8, dtype=torch.float32)[None]
        bare = _without_output(whole, names)
        if output_layer(whole).bias is None and torch.equal(logits_of(bare, names, h_LD), h_LD):
            return
    raise ValueError(
        f"fused_loss: the logits of model_type {whole.config.model_type!r} are not those of its output weight "
        "alone (a soft cap, a scale, a bias): leave it out"
    )


def acts_on_each_logit(whole: Any, names: Names) -> bool:
    """Whether a model does to each logit alone whatever it does to them, so that it may get a part of them."""
    with torch.no_grad(), torch.device("cpu"):
        half = max(1, len(output_layer(whole).weight) // 2)
        logits_LV = torch.linspace(-9, 9, 2 * half, dtype=torch.float32)[None]
        bare = _without_output(whole, names)
        made = logits_of(bare, names, logits_LV)
        parts = [logits_of(bare, names, part) for part in logits_LV.split(half, dim=-1)]
        return made.shape == logits_LV.shape and torch.equal(made, torch.cat(parts, dim=-1))


def library_router_loss(whole: Any, names: Names, logits_TE: Sequence[Tensor], mask: Tensor) -> Tensor | None:
    """The load balancing loss that transformers computes from the logits of some routers; ``None``: it has none.

    Args:
        whole: a model without weights.
        names: the names of its parts.
        logits_TE: the logits of each router.
        mask: (1, T), 0 for tokens that do not count.
    """
    model, decoder, output = _with_head(whole, names)
    below = _ReadyDecoder(model.get_submodule(decoder), tuple(logits_TE))
    shell = shell_of(model, **{decoder: below, output: nn.Identity()})
    h_1TD = torch.zeros(*mask.shape, 1, dtype=torch.float32)
    out = shell(inputs_embeds=h_1TD, attention_mask=mask, use_cache=False, output_router_logits=True)
    return getattr(out, "aux_loss", None)


def _with_head(whole: Any, names: Names) -> tuple[Any, str, str]:
    """The innermost model that has decoder and output layer, and its children that are these, or hold them."""
    inside, _, output = names.output.rpartition(".")
    decoder = names.decoder.removeprefix(f"{inside}.") if inside else names.decoder
    return whole.get_submodule(inside), decoder.partition(".")[0], output


def _without_output(whole: Any, names: Names) -> Any:
    """A shallow copy of the whole model whose output layer returns its input."""
    inside, _, child = names.output.rpartition(".")
    bare: Any = nn.Identity()
    while True:
        bare = shell_of(whole.get_submodule(inside), **{child: bare})
        if not inside:
            return bare
        inside, _, child = inside.rpartition(".")


@dataclass
class _Ready(ModelOutput):
    """What a model without its head returns. Whatever else a head asks for is ``None``."""

    last_hidden_state: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None

    def __getattr__(self, name: str) -> None:
        return None


class _ReadyDecoder(PassThrough):
    """Stands in for a decoder: the embeddings that it gets are final hidden states already."""

    def __init__(self, instead_of: nn.Module, router_logits: tuple[Tensor, ...] | None = None) -> None:
        super().__init__(instead_of)
        self.router_logits = router_logits

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _Ready:
        return _Ready(last_hidden_state=inputs_embeds, router_logits=self.router_logits)
