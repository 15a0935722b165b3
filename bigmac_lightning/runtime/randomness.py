"""Controls torch's random number generators: random numbers that depend on a given key, and a saved state with which a
computation can run again with the same random numbers.

Both apply to the CPU's generator and, on other devices, to the generator of one device.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, *key: object) -> Iterator[Callable[..., None]]:
    """Make the random numbers inside the block depend on `key` alone, and restore the generators' states afterwards.

    The block gets a function. After a call of it, random numbers depend on `key` and its arguments alone, whatever has
    been drawn before. The seed is a SHA-256 hash of the key's text, because Python's own hash of a text differs between
    processes.

    Args:
        device: device whose generator is seeded besides the CPU's.
        key: values such as (seed, step, rank), whose ``repr`` must be the same in every run.
    """
    others = [] if device.type == "cpu" else [device]

    def seed(*further: object) -> None:
        number = int.from_bytes(hashlib.sha256(repr((*key, *further)).encode()).digest()[:8], "big") >> 1
        torch.default_generator.manual_seed(number)
        if others:
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(number)

    with torch.random.fork_rng(others, device_type=device.type):
        seed()
        yield seed


class RandomState:
    """The state of the generators at the time at which this object is created.

    Args:
        device: device whose generator is saved besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Set the generators to this state inside the block, and restore their states afterwards."""
        others = [] if self._other is None else [self._device]
        with torch.random.fork_rng(others, device_type=self._device.type):
            torch.set_rng_state(self._cpu)
            if self._other is not None:
                torch.get_device_module(self._device).set_rng_state(self._other, self._device)
            yield
