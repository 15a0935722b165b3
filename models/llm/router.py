"""The load balancing loss of a mixture of experts whose layers may lie in different stages.

The loss of `transformers` (`load_balancing_loss_func`; Switch Transformer, arXiv 2101.03961, equations 4 to 6)
multiplies two means over the tokens of *all* layers. A product of means is no sum over layers, so stages cannot each
compute a part of the loss. Instead the two sums behind the means go from layer to layer with the hidden states, and the
last stage makes the loss of them.

Shape suffixes: T tokens of a microbatch, E experts, K experts of a token.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ..meta_model import Names
from .head import library_router_loss
from .layer_cost import experts_per_token

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""The names under which the configs of transformers have the number of experts, and the weight of the loss."""


@dataclass(frozen=True)
class Routers:
    """The routers of a decoder that is trained with a load balancing loss.

    Attributes:
        number: the number of routers in all layers.
        experts: the number of experts of each router, E.
        per_token: the number of experts that a token is routed to.
        coefficient: the weight of the loss, from the config.
    """

    number: int
    experts: int
    per_token: int
    coefficient: float

    def add(
        self,
        sums_2E: Tensor,
        router_logits: Iterable[Tensor],
        mask_T: Tensor | None,
        tokens: Tensor | float | None = None,
    ) -> Tensor:
        """Sums over routers of the share of tokens sent to each expert (row 0) and of its mean probability (row 1).

        Args:
            sums_2E: the sums over the routers of the layers before.
            router_logits: logits_TE of each router of these layers.
            mask_T: 0 for tokens that do not count; ``None``: all tokens count.
            tokens: the number of tokens that shares and means are taken over; ``None``: of those that count. If these
                are a slice of a microbatch, it is the number of the whole microbatch, so that results of slices add up.
        """
        for logits_TE in router_logits:
            probabilities_TE = logits_TE.softmax(-1)
            experts_TK = probabilities_TE.topk(self.per_token, dim=-1).indices
            probabilities_TE = probabilities_TE.float()
            ones_T = torch.ones(len(logits_TE), device=logits_TE.device)
            weights_T = ones_T if mask_T is None else mask_T.flatten().float()
            counts_E = weights_T.new_zeros(self.experts)
            counts_E = counts_E.scatter_add(0, experts_TK.flatten(), weights_T.repeat_interleave(self.per_token))
            layer_2E = torch.stack([counts_E, (probabilities_TE * weights_T[:, None]).sum(0)])
            layer_2E = layer_2E / (weights_T.sum() if tokens is None else tokens)
            sums_2E = sums_2E.float() + layer_2E
        return sums_2E

    def loss(self, sums_2E: Tensor) -> Tensor:
        """The loss, a scalar, from the sums over all layers."""
        sent_E, probability_E = (sums_2E.float() / self.number).unbind()
        return self.experts * (sent_E * probability_E).sum()


def routers_of(whole: Any, decoder: PreTrainedModel, names: Names, config: Any) -> Routers:
    """The routers that the library's load balancing loss looks at.

    The library's own loss of drawn logits is compared with the loss of `Routers`, so that a model whose loss differs
    from it is refused rather than trained with another loss.

    Args:
        whole, decoder: the model and its decoder, without weights.
        names: the names of the model's parts.
        config: the config of the decoder.

    Raises:
        ValueError: the library has no such loss for this model, or one that differs from that of `Routers`.
    """
    number = len(
        [r for layer in range(len(list(decoder.get_submodule("layers").children()))) for r in _routers(decoder, layer)]
    )
    experts, coefficient = (
        next((v for n in names if (v := getattr(config, n, None)) is not None), None)
        for names in (_EXPERTS, _COEFFICIENTS)
    )
    problem = "has no load balancing loss in transformers"
    if number and experts and coefficient is not None:
        routers = Routers(number, experts, experts_per_token(config), coefficient)
        with torch.no_grad(), torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            logits = [torch.randn(6, experts, generator=generator, dtype=torch.float32) for _ in range(number)]
            mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
            expected = library_router_loss(whole, names, logits, mask)
            if expected is not None and torch.is_tensor(expected):
                found = routers.loss(routers.add(torch.zeros(2, experts, dtype=torch.float32), logits, mask))
                if torch.allclose(found, expected, rtol=1e-5):
                    return routers
                problem = "has another load balancing loss in transformers than is known here"
    raise ValueError(
        f"{type(whole).__name__} {problem}: set output_router_logits to false in the config, to train without it"
    )


@contextmanager
def recorded_logits(decoder: PreTrainedModel, layers: Iterable[int]) -> Iterator[list[Tensor]]:
    """A list to which the routers of these layers add their logits_TE for as long as the block runs."""
    recorded: list[Tensor] = []

    def record(index: int, router: nn.Module, args: Any, output: Any) -> None:
        recorded.append(output[index] if isinstance(output, tuple) else output)

    found = [pair for k in layers for pair in _routers(decoder, k)]
    handles = [router.register_forward_hook(partial(record, index)) for router, index in found]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _routers(decoder: PreTrainedModel, layer: int) -> list[tuple[nn.Module, int]]:
    """A layer's routers, each with the index of the logits in its output. The library's own recorder says which."""
    recorder = (type(decoder)._can_record_outputs or {}).get("router_logits")
    if not isinstance(recorder, OutputRecorder):
        return []
    inside = "" if recorder.layer_name is None else f".{recorder.layer_name.strip('.')}."
    return [
        (module, recorder.index)
        for name, module in decoder.get_submodule(f"layers.{layer}").named_modules()
        if isinstance(module, recorder.target_class) and inside in f".{name}."
    ]
