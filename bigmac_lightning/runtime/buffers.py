"""Synchronizes buffers that change in training, such as running statistics, over ranks that have replicas of a module
and process different items."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigmac_lightning.host import from_host


class ReplicatedBuffers:
    """The persistent buffers of replicated modules.

    Buffers that are not persistent, such as tables of positions, are computed in each process and do not change.

    Args:
        modules: the modules, in the same order on all ranks of the group.
        group: process group of the ranks that have replicas; ``None`` means all ranks.
    """

    def __init__(self, modules: Iterable[nn.Module], group: dist.ProcessGroup | None) -> None:
        self._buffers = list({id(buffer): buffer for module in modules for buffer in _persistent(module)}.values())
        self._group = group
        self._versions = [buffer._version for buffer in self._buffers]

    def synchronize(self) -> None:
        """Replace each buffer that has changed on any rank. Collective: all ranks of the group must call it.

        A floating-point buffer becomes the mean over the ranks on which it changed; an integer buffer (a counter)
        becomes the largest value of all ranks. A change is recognized by the tensor's version counter.
        """
        if not self._buffers:
            return
        versions = [buffer._version for buffer in self._buffers]
        changed_here = [new != old for new, old in zip(versions, self._versions, strict=True)]
        ranks_changed = from_host(changed_here, torch.float32, self._buffers[0].device)
        dist.all_reduce(ranks_changed, group=self._group)
        for buffer, changed, ranks in zip(self._buffers, changed_here, ranks_changed.tolist(), strict=True):
            if ranks and buffer.is_floating_point():
                mean = buffer.detach().to(torch.promote_types(buffer.dtype, torch.float32)) * (changed / ranks)
                dist.all_reduce(mean, group=self._group)
                buffer.copy_(mean)
            elif ranks:
                dist.all_reduce(buffer, dist.ReduceOp.MAX, group=self._group)
        self._versions = [buffer._version for buffer in self._buffers]


def _persistent(module: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that are part of the module's state dict."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield buffer
