"""Buffers that change in training, such as running statistics: kept equal on ranks that hold the same module, and work
on other items.

Knows modules and process groups; knows nothing of what the buffers are.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ReplicatedBuffers:
    """Persistent buffers of modules that several ranks hold. Others (tables, positions) are made anew in each process,
    and never change.

    Args:
        modules: the same on all ranks of the group.
        group: of those ranks; ``None``: all.
    """

    def __init__(self, modules: Iterable[nn.Module], group: dist.ProcessGroup | None) -> None:
        self._buffers = list({id(buffer): buffer for module in modules for buffer in _persistent(module)}.values())
        self._group = group
        self._versions = [buffer._version for buffer in self._buffers]

    def synchronize(self) -> None:
        """Give each buffer that has changed anywhere the mean over the ranks on which it has; integers, the largest
        value. Collective."""
        if not self._buffers:
            return
        now = [buffer._version for buffer in self._buffers]
        own = [new != old for new, old in zip(now, self._versions, strict=True)]
        changed = torch.tensor(own, dtype=torch.float32, device=self._buffers[0].device)
        everywhere = changed.clone()
        dist.all_reduce(everywhere, group=self._group)
        for buffer, weight, total in zip(self._buffers, changed.tolist(), everywhere.tolist(), strict=True):
            if total and buffer.is_floating_point():
                mean = buffer.detach().to(torch.promote_types(buffer.dtype, torch.float32)) * (weight / total)
                dist.all_reduce(mean, group=self._group)
                buffer.copy_(mean)
            elif total:
                dist.all_reduce(buffer, dist.ReduceOp.MAX, group=self._group)
        self._versions = [buffer._version for buffer in self._buffers]


def _persistent(module: nn.Module) -> Iterator[Tensor]:
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield buffer
