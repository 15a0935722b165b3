"""Exchanges small objects between all processes of a run, on the CPU and under any strategy."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bigmac_lightning.groups import destroy_with


class Ranks:
    """The processes of a run, which may be only one. The process group is made when it is first needed."""

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def rank(self) -> int:
        """This process's rank among all processes."""
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    @property
    def group(self) -> Any:
        """The process group of all processes, for the CPU. Collective at first, where all must come here."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_timeout_of_the_run())
            destroy_with(self, [self._group])
        return self._group

    def exchange(self, own: Any, check: int = 0) -> Callable[[], tuple[list[Any], bool]]:
        """Start to send an object to every rank, without waiting for the others. Collective.

        If all objects are empty (``bool(own)`` is false), only three numbers are exchanged.

        Args:
            own: an object that can be pickled.
            check: a number that should be the same on all ranks.

        Returns: a function that waits for the others. It gives the objects by rank, or an empty list if all are empty;
        and whether `check` is the same on all ranks. Collective; call it before the next `exchange`.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return lambda: ([own], True)
        group, numbers = self.group, torch.tensor([int(bool(own)), check, -check])
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None

        def everyone() -> tuple[list[Any], bool]:
            work.wait()
            any_object, most, least = numbers.tolist()
            return self.gather(own) if any_object else [], most == -least

        return everyone

    def gather(self, own: Any) -> list[Any]:
        """The objects of all ranks, by rank. Collective."""
        if self._group is None:
            return [own]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own, group=self._group)
        return everyone


def _timeout_of_the_run() -> timedelta:
    """The timeout of the default group, which the strategy has set; a new group would have torch's 30 minutes."""
    world: Any = dist.group.WORLD
    return world._get_backend(world._device_types[0]).options._timeout
