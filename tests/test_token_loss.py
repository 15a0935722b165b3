from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.token_loss import Gradients, chunked_gradients, fused_token_loss, token_loss
from bigmac_lightning.models.llm.liger import liger_gradients


class Watched(nn.Linear):
    """An output weight that remembers how many logits it made at once."""

    most = 0

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("predict", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 22, 70, 10**6])
def test_chunks_change_nothing_but_the_memory(chunk_elements: int, predict: bool) -> None:
    torch.manual_seed(0)
    head, labels = Watched(5, 11), torch.randint(0, 11, (13,))
    hidden = torch.randn(13, 5, requires_grad=True)
    expected = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    best = head(hidden).argmax(-1)
    reference = torch.autograd.grad(expected, [hidden, head.weight, head.bias])
    head.most = 0
    loss, predictions = token_loss(head, hidden, labels, 11, predict, chunk_elements)
    gradients = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
    assert head.most <= max(11, min(chunk_elements, 13 * 11))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, wanted in zip(gradients, reference, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(predictions, best) if predict else predictions is None


def test_without_gradients() -> None:
    head = nn.Linear(5, 11)
    with torch.no_grad():
        loss, predictions = token_loss(head, torch.randn(4, 5), torch.tensor([1, 2, 3, 4]), 11, True, 11)
    assert not loss.requires_grad
    assert predictions is not None
    assert predictions.shape == (4,)


@pytest.mark.parametrize("chunk_elements", [1, 70, 10**6])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_fused_against_not_fused(kind: str, chunk_elements: int) -> None:
    compare(kind, partial(chunked_gradients, chunk_elements=chunk_elements))


def compare(kind: str, gradients: Gradients, device: str = "cpu") -> None:
    """In single precision the same; in bfloat16 no further from the truth than a plain backward is."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    around: Any = torch.autocast(device, torch.bfloat16) if kind == "autocast" else nullcontext()
    hidden = torch.randn(13, 5).to(device, dtype).requires_grad_()
    weight, labels = nn.Parameter(torch.randn(11, 5).to(device, dtype)), torch.randint(0, 11, (13,)).to(device)
    with around:
        loss = fused_token_loss(hidden, weight, labels, gradients)
        plain, _ = token_loss(lambda h: h @ weight.T, hidden, labels, 11, False)
    found = torch.autograd.grad(0.5 * loss, [hidden], retain_graph=True)  # in two halves, as some backbones do it
    found += torch.autograd.grad(0.5 * loss, [weight])
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    wanted = nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
    truth = torch.autograd.grad(0.5 * wanted, exact)
    others = torch.autograd.grad(0.5 * plain, [hidden, weight])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for mine, true, other in zip(found, truth, others, strict=True):
        assert mine.dtype == dtype
        rounding = (other.double() - true).norm() / true.norm()
        assert (mine.double() - true).norm() / true.norm() <= max(1e-6, 2 * float(rounding))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs there")
def test_the_liger_kernels_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="fused_loss='liger' needs a GPU"):
        compare("float32", liger_gradients)


def test_fused_with_a_frozen_weight() -> None:
    hidden, weight = torch.randn(3, 5, requires_grad=True), torch.randn(11, 5)
    labels = torch.tensor([1, 2, 3])
    (found,) = torch.autograd.grad(fused_token_loss(hidden, weight, labels, chunked_gradients), [hidden])
    (wanted,) = torch.autograd.grad(nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum"), [hidden])
    torch.testing.assert_close(found, wanted)


def test_fused_in_half_precision() -> None:
    hidden, weight = torch.randn(3, 5).half().requires_grad_(), torch.randn(11, 5).half()
    with pytest.raises(ValueError, match="use bfloat16"):
        fused_token_loss(hidden, weight, torch.tensor([1, 2, 3]), chunked_gradients)
