"""The state of the random number generators that a computation draws from, so that it can be done once more.

Knows the CPU's generator and that of one other device.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The state at the moment of construction.

    Args:
        device: whose generator counts besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw from this state inside the block, and go on afterwards as if it had never run."""
        others = [] if self._other is None else [self._device]
        with torch.random.fork_rng(others, device_type=self._device.type):
            torch.set_rng_state(self._cpu)
            if self._other is not None:
                torch.get_device_module(self._device).set_rng_state(self._other, self._device)
            yield
