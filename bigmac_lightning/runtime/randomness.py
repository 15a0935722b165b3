"""The random number generators that a computation draws from: a state of them, so that it can be done once more, and
numbers of one's own.

Knows the CPU's generator and that of one other device.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawing(device: torch.device, *key: object) -> Iterator[None]:
    """Whatever is drawn inside depends on `key` alone, and the state outside is left alone.

    Args:
        device: whose generator counts besides the CPU's.
    """
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if others:
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(seed)
        yield


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
