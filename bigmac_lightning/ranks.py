"""All processes of a run telling each other small things, on the CPU, whatever the strategy.

Knows torch.distributed's default group; knows nothing of pipelines, data or models.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The processes of a run; one process where there are no others. The group is made when it is first needed."""

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def rank(self) -> int:
        """Of this process among all."""
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def tell(self, own: Any, check: int = 0) -> Callable[[], tuple[list[Any], bool]]:
        """Say something to every rank, without waiting for the others. Collective.

        Args:
            own: anything that can be pickled.
            check: a number that should be the same on all ranks.

        Returns: waits for the others, and gives what every rank says and whether they have the same number. It says
        nothing if all say something empty, which costs three numbers. Collective; to be called before the next `tell`.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return lambda: ([own], True)
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_timeout_of_the_run())
        group, numbers = self._group, torch.tensor([int(bool(own)), check, -check])
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None

        def everyone() -> tuple[list[Any], bool]:
            work.wait()
            said, most, least = numbers.tolist()
            told: list[Any] = []
            if said:
                told = self.gather(own)
            return told, most == -least

        return everyone

    def gather(self, own: Any) -> list[Any]:
        """What every rank says, by rank. Collective."""
        if self._group is None:
            return [own]
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, own, group=self._group)
        return told


def _timeout_of_the_run() -> timedelta:
    """Of the default group, which the strategy has made; a group that is made without one would wait 30 minutes."""
    world: Any = dist.group.WORLD
    return world._get_backend(world._device_types[0]).options._timeout
