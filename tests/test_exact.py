import pytest
import torch

from bigmac_lightning.training.exact import apart, parts_of, together


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_and_gradients_arrive_whole(dtype: torch.dtype) -> None:
    """float16 has no numbers below 6e-8."""
    generator = torch.Generator().manual_seed(0)
    exact, weights = torch.randn(2, 3, 7, generator=generator).unbind()
    exact.requires_grad_()
    message = apart(exact, dtype)
    assert message.dtype == dtype
    assert message.shape == (21 * parts_of(dtype),)
    arrived = message.detach().requires_grad_()
    number = together(arrived).view(3, 7)
    (number * weights).sum().backward()
    message.backward(arrived.grad)
    tolerance = 1e-3 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(number.detach(), exact.detach(), rtol=tolerance * 1e-4, atol=tolerance * 1e-4)
    torch.testing.assert_close(exact.grad, weights, rtol=tolerance * 1e-4, atol=tolerance * 1e-4)
