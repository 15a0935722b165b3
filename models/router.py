"""Load balancing of a mixture of experts' routers, over layers that may lie in different stages.

The loss of `transformers` (`load_balancing_loss_func`; Switch Transformer, arXiv 2101.03961, equations 4 to 6) takes
its means over the tokens of *all* layers before it multiplies them, so it is no sum of losses of layers. What travels
from layer to layer are the two sums; the last stage makes the loss of them.

Shape suffixes: T tokens of a microbatch, E experts.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder


def experts_of_routers(decoder: PreTrainedModel) -> list[int]:
    """The number of experts of each router of a decoder, layer by layer."""
    routers = [router for layer in decoder.get_submodule("layers").children() for router, _ in _routers(decoder, layer)]
    return [len(next(router.parameters())) for router in routers]


@contextmanager
def recorded_logits(decoder: PreTrainedModel, layers: Iterable[int]) -> Iterator[list[Tensor]]:
    """A list that the logits_TE of these layers' routers go into while the block runs."""
    recorded: list[Tensor] = []

    def record(index: int, router: nn.Module, args: Any, output: Any) -> None:
        recorded.append(output[index] if isinstance(output, tuple) else output)

    found = [pair for k in layers for pair in _routers(decoder, decoder.get_submodule(f"layers.{k}"))]
    handles = [router.register_forward_hook(partial(record, index)) for router, index in found]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _routers(decoder: PreTrainedModel, layer: nn.Module) -> list[tuple[nn.Module, int]]:
    """A layer's routers, and where in their output the logits are: as the library itself would record them."""
    recorder = (type(decoder)._can_record_outputs or {}).get("router_logits")
    if not isinstance(recorder, OutputRecorder):
        raise ValueError(
            f"{type(decoder).__name__} does not say what its routers' logits are: set output_router_logits to false "
            "in the config, to train without the load balancing loss"
        )
    return [(module, recorder.index) for module in layer.modules() if isinstance(module, recorder.target_class)]


def add_router_sums(sums_2E: Tensor, router_logits: Iterable[Tensor], top_k: int, mask_T: Tensor | None) -> Tensor:
    """Sums over layers of the share of tokens routed to each expert (row 0) and of its mean probability (row 1).

    Args:
        sums_2E: of the layers before.
        router_logits: logits_TE of each of these layers.
        top_k: experts per token.
        mask_T: 0 for tokens that do not count; ``None``: all count.
    """
    for logits_TE in router_logits:
        probabilities_TE = logits_TE.softmax(-1)
        chosen = probabilities_TE.topk(top_k, dim=-1).indices
        probabilities_TE = probabilities_TE.float()
        weights_T = torch.ones(len(logits_TE), device=logits_TE.device) if mask_T is None else mask_T.flatten().float()
        counts_E = weights_T.new_zeros(logits_TE.shape[-1])
        counts_E = counts_E.scatter_add(0, chosen.flatten(), weights_T.repeat_interleave(top_k))
        layer_2E = torch.stack([counts_E, (probabilities_TE * weights_T[:, None]).sum(0)]) / weights_T.sum()
        sums_2E = sums_2E.float() + layer_2E
    return sums_2E


def load_balancing_loss(sums_2E: Tensor, layers: int) -> Tensor:
    """The loss, a scalar.

    Args:
        sums_2E: over all layers.
        layers: how many of them have a router.
    """
    routed_E, probability_E = (sums_2E.float() / layers).unbind()
    return sums_2E.shape[1] * (routed_E * probability_E).sum()
