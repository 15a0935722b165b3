"""The sampler of every strategy: the same order on one device, under ddp and under bigmac.

Knows epochs and replicas as numbers; knows nothing of samples.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler


class EpochSampler(DistributedSampler):
    """Yields (epoch, index), so that what is random about a sample can depend on both, in any worker process.

    Lightning leaves a `DistributedSampler` alone and tells it the epoch. With several replicas the last samples are
    repeated until all have equally many: an evaluation then counts a few samples twice.
    """

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in super().__iter__())
