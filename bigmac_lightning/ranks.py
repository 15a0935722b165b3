"""All processes of a run telling each other small things, on the CPU, whatever the strategy.

Knows torch.distributed's default group; knows nothing of pipelines, data or models.
"""

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

    def gather(self, own: Any) -> list[Any]:
        """What every rank says; nothing if all say something empty, which costs a single number. Collective.

        Args:
            own: anything that can be pickled.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return [own]
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        flag = torch.tensor(int(bool(own)))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        if not flag:
            return []
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own, group=self._group)
        return everyone
