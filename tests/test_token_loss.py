import pytest
import torch
from torch import Tensor, nn

from bigmac_lightning.token_loss import token_loss


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
