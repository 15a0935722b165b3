"""The text loss by the Liger kernels: logits, loss and gradients in one kernel, for GPUs.

Needs `pip install bigmac-lightning[liger]`. Only their loss is used: nothing in `transformers` is replaced. Knows
hidden states and an output weight; knows nothing of models.

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
        ValueError: the kernels are not there.
    """
    if find_spec("liger_kernel") is None:
        raise ValueError("fused_loss='liger' needs the kernels: pip install 'bigmac-lightning[liger]', or use True")


def liger_gradients(
    h_LD: Tensor, weight_VD: Tensor, labels: Tensor, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and gradients, as `fused_token_loss` wants them.

    Their own backward scales what it has saved in place, so it is run here, once and unscaled.

    Raises:
        ValueError: on the CPU, unless Triton interprets its kernels there.
    """
    if h_LD.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("fused_loss='liger' needs a GPU: use fused_loss=True on the CPU")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight = h_LD.detach().requires_grad_(), weight_VD.detach().requires_grad_(of_weight)
    with torch.enable_grad():
        loss: Any = liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="sum")
        found = torch.autograd.grad(loss, [hidden, weight] if of_weight else [hidden])
    return loss.detach(), found[0], found[1] if of_weight else None
