"""Cross-entropy of labelled tokens without holding all their logits at once.

Knows hidden states, labels and a function from one to logits of the other; knows nothing of microbatches or models.

Shape suffixes: L labelled positions, D width of the LLM, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26
"""Logits held at once (256 MiB of fp32)."""


def token_loss(
    logits: Callable[[Tensor], Tensor],
    h_LD: Tensor,
    labels: Tensor,
    vocabulary: int,
    predict: bool,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """The sum of the token losses, and the most likely tokens.

    Where the logits of all positions are more than `chunk_elements`, they are made for one run of positions after
    another, and again in the backward: memory is bounded and the result is the same.

    Args:
        logits: logits_LV of hidden states.
        h_LD: hidden states at labelled positions, L > 0.
        labels: (L,) token ids.
        vocabulary: V; 0: never too many.
        predict: whether to return predictions.
        chunk_elements: largest number of logits to hold.

    Returns: a scalar, and (L,) token ids or ``None``.
    """

    def of_chunk(h_LD: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits_LV = logits(h_LD)
        loss = nn.functional.cross_entropy(logits_LV.float(), labels, reduction="sum")
        return loss, logits_LV.argmax(-1) if predict else None

    positions = max(1, chunk_elements // max(1, vocabulary))
    if positions >= len(labels):
        return of_chunk(h_LD, labels)
    losses: list[Tensor] = []
    predictions: list[Tensor] = []
    for h_chunk, labels_chunk in zip(h_LD.split(positions), labels.split(positions), strict=True):
        if torch.is_grad_enabled():
            loss, predicted = checkpoint(of_chunk, h_chunk, labels_chunk, use_reentrant=False)
        else:
            loss, predicted = of_chunk(h_chunk, labels_chunk)
        losses.append(loss)
        if predicted is not None:
            predictions.append(predicted)
    return torch.stack(losses).sum(), torch.cat(predictions) if predict else None
