"""Load balancing of a mixture of experts' routers, over layers that may lie in different stages.

The loss of `transformers` (`load_balancing_loss_func`; Switch Transformer, arXiv 2101.03961, equations 4 to 6) takes
its means over the tokens of *all* layers before it multiplies them, so it is no sum of losses of layers. What travels
from layer to layer are the two sums; the last stage makes the loss of them.

Shape suffixes: T tokens of a microbatch, E experts.
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

from ..surgery import path_of
from .head import library_router_loss
from .work import routed

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class Routers:
    """Those of a decoder that are trained with a load balancing loss.

    Attributes:
        number: how many there are.
        experts: that each chooses from, E.
        chosen: experts per token.
        coefficient: of the loss, by the config.
    """

    number: int
    experts: int
    chosen: int
    coefficient: float

    def add(self, sums_2E: Tensor, router_logits: Iterable[Tensor], mask_T: Tensor | None) -> Tensor:
        """Sums over routers of the share of tokens sent to each expert (row 0) and of its mean probability (row 1).

        Args:
            sums_2E: of the layers before.
            router_logits: logits_TE of each router of these layers.
            mask_T: 0 for tokens that do not count; ``None``: all count.
        """
        for logits_TE in router_logits:
            probabilities_TE = logits_TE.softmax(-1)
            chosen = probabilities_TE.topk(self.chosen, dim=-1).indices
            probabilities_TE = probabilities_TE.float()
            ones_T = torch.ones(len(logits_TE), device=logits_TE.device)
            weights_T = ones_T if mask_T is None else mask_T.flatten().float()
            counts_E = weights_T.new_zeros(self.experts)
            counts_E = counts_E.scatter_add(0, chosen.flatten(), weights_T.repeat_interleave(self.chosen))
            layer_2E = torch.stack([counts_E, (probabilities_TE * weights_T[:, None]).sum(0)]) / weights_T.sum()
            sums_2E = sums_2E.float() + layer_2E
        return sums_2E

    def loss(self, sums_2E: Tensor) -> Tensor:
        """The loss, a scalar, from the sums over all layers."""
        sent_E, probability_E = (sums_2E.float() / self.number).unbind()
        return self.experts * (sent_E * probability_E).sum()


def routers_of(whole: Any, decoder: PreTrainedModel, config: Any) -> Routers:
    """What the library makes its load balancing loss of.

    Args:
        whole, decoder: the model and its decoder, without weights.
        config: of the decoder.

    Raises:
        ValueError: the library makes no such loss for this model, or another one than is made here.
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
        routers = Routers(number, experts, routed(config), coefficient)
        with torch.no_grad(), torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            logits = [torch.randn(6, experts, generator=generator, dtype=torch.float32) for _ in range(number)]
            mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
            names = path_of(decoder, whole), path_of(whole.get_output_embeddings(), whole)
            expected = library_router_loss(whole, *names, logits, mask)
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
    """A list that the logits_TE of these layers' routers go into while the block runs."""
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
    """A layer's routers, and where in their output the logits are: as the library itself would record them."""
    recorder = (type(decoder)._can_record_outputs or {}).get("router_logits")
    if not isinstance(recorder, OutputRecorder):
        return []
    inside = "" if recorder.layer_name is None else f".{recorder.layer_name.strip('.')}."
    return [
        (module, recorder.index)
        for name, module in decoder.get_submodule(f"layers.{layer}").named_modules()
        if isinstance(module, recorder.target_class) and inside in f".{name}."
    ]
