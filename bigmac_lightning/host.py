"""Copies small values from the host to the device without making the host wait for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def from_host(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of these values on the device.

    ``torch.tensor(values, device=device)`` would copy from pageable memory, which waits until the device has done all
    work that was given to it before.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
