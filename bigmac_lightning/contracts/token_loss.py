"""Cross-entropy of labelled tokens, without all of their logits in memory at once.

Shape suffixes: L labelled positions, D width of the LLM, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bigmac_lightning.contracts.precision import widened

CHUNK_ELEMENTS = 2**26
"""Most logits in memory at once: 256 MiB of fp32, small beside a stage's activations, and still large matrices."""

LossOfLogits = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""A function (logits_LV, labels, whether to predict) -> (the sum of the token losses, the most likely tokens or
``None``)."""


def cross_entropy_of(logits_LV: Tensor, labels: Tensor, predict: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the token losses, and with `predict` the most likely tokens."""
    loss = nn.functional.cross_entropy(widened(logits_LV), labels, reduction="sum")
    return loss, logits_LV.argmax(-1) if predict else None


def token_loss(
    logits: Callable[[Tensor], Tensor],
    h_LD: Tensor,
    labels: Tensor,
    vocabulary: int,
    predict: bool,
    chunk_elements: int = CHUNK_ELEMENTS,
    loss_of: LossOfLogits | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sum of the token losses, and the most likely tokens.

    If the logits of all positions are more than `chunk_elements`, they are computed for one chunk of positions after
    another, and once more in the backward: memory is bounded and the result is the same.

    Args:
        logits: function from hidden states h_LD to logits_LV.
        h_LD: hidden states at labelled positions, L > 0.
        labels: (L,) token ids.
        vocabulary: V; 0 if it is not known: all positions then make one chunk.
        predict: whether to return predictions.
        chunk_elements: largest number of logits in memory.
        loss_of: computes the result from the logits of a chunk; by default `cross_entropy_of`.

    Returns: the sum, a scalar; and the most likely tokens, (L,) token ids, or ``None`` without `predict`.
    """

    def of_chunk(h_LD: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        return (loss_of or cross_entropy_of)(logits(h_LD), labels, predict)

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


Gradients = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor | None]]
"""A function (h_LD, weight_VD, labels, whether the weight's gradient is wanted) -> (the sum of the token losses, its
gradient by the hidden states, its gradient by the weight)."""


def fused_token_loss(h_LD: Tensor, weight_VD: Tensor, labels: Tensor, gradients: Gradients) -> Tensor:
    """The sum of the token losses, with its gradients computed at the same time, so that logits are computed once.

    The gradient of the output weight stays in memory from the forward to the backward, so few microbatches should be
    in flight. The result cannot be differentiated twice.

    Args:
        h_LD: hidden states at labelled positions, L > 0.
        weight_VD: output weight; the logits are h_LD @ weight_VD.T, in the types that autocast gives them.
        labels: (L,) token ids.
        gradients: function that computes loss and gradients, such as `chunked_gradients`.

    Raises:
        ValueError: the logits are float16.
    """
    return _FusedTokenLoss.apply(h_LD, weight_VD, labels, gradients)


def loss_and_gradient(logits_LV: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the token losses, and its gradient by the logits."""
    logarithms = logits_LV.log_softmax(-1)
    loss = -logarithms.gather(1, labels[:, None]).sum()
    by_logits = logarithms.exp_()
    return loss, by_logits.scatter_add_(1, labels[:, None], by_logits.new_full((len(labels), 1), -1.0))


def chunked_gradients(
    h_LD: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    of_weight: bool,
    chunk_elements: int = CHUNK_ELEMENTS,
    of_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_gradient,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and gradients by plain PyTorch, with at most `chunk_elements` logits in memory; sums are taken in fp32.

    Args:
        of_logits: computes loss and gradient from the logits of a chunk.
    """
    sums = torch.promote_types(h_LD.dtype, torch.float32)
    loss, hidden = torch.zeros((), dtype=sums, device=h_LD.device), list[Tensor]()
    gradient_VD = torch.zeros_like(weight_VD, dtype=sums) if of_weight else None
    positions = max(1, chunk_elements // len(weight_VD))
    for h, wanted in zip(h_LD.split(positions), labels.split(positions), strict=True):
        logits = h @ weight_VD.T
        chunk_loss, by_logits = of_logits(widened(logits), wanted)
        loss += chunk_loss
        by_logits = by_logits.to(logits.dtype)
        hidden.append((by_logits @ weight_VD).to(h_LD.dtype))
        if gradient_VD is not None:
            gradient_VD += by_logits.T @ h
    return loss, torch.cat(hidden), None if gradient_VD is None else gradient_VD.to(weight_VD.dtype)


class _FusedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_LD: Tensor, weight_VD: Tensor, labels: Tensor, gradients: Gradients) -> Tensor:
        device = h_LD.device.type
        if (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_LD.dtype) == torch.float16:
            raise ValueError("fused_loss: in float16 small gradients vanish before they are scaled: use bfloat16")
        loss, by_hidden, by_weight = gradients(h_LD, weight_VD, labels, ctx.needs_input_grad[1])
        ctx.save_for_backward(by_hidden, by_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore
        """Scales copies of the saved gradients: backbones with split backwards ask for them one after the other."""
        by_hidden, by_weight = ctx.saved_tensors
        scaled = None if by_weight is None else by_weight * scale.to(by_weight.dtype)
        return by_hidden * scale.to(by_hidden.dtype), scaled, None, None
