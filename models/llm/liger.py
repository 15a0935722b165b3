"""The text loss with the Liger kernels, which make logits, loss and gradients in one kernel on a GPU.

They need `pip install bigmac-lightning[liger]`. Only their loss is used; nothing in `transformers` is replaced.

Shape suffixes: L labelled positions, D width of the LLM, V vocabulary.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def check_installed() -> None:
    """
    Raises:
        ValueError: the kernels are not installed.
    """
    if find_spec("liger_kernel") is None:
        raise ValueError("fused_loss='liger' needs the kernels: pip install 'bigmac-lightning[liger]', or use True")


def liger_gradients(
    h_LD: Tensor, weight_VD: Tensor, labels: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss and its gradients, in the form that `fused_token_loss` takes.

    The backward of the kernels scales the saved gradients in place, so a second backward would scale them again. It
    runs here, once and with the scale 1, and `fused_token_loss` scales the result.

    Args:
        of_weight: whether the gradient of the weight is wanted.

    Raises:
        ValueError: the tensors are on the CPU, and Triton does not interpret its kernels there.
    """
    if h_LD.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("fused_loss='liger' needs a GPU: use fused_loss=True on the CPU")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight = h_LD.detach().requires_grad_(), weight_VD.detach().requires_grad_(of_weight)
    with torch.enable_grad():
        loss: Any = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")
        found = torch.autograd.grad(loss, [hidden, weight] if of_weight else [hidden])
    return loss.detach(), found[0], found[1] if of_weight else None
