"""Batches that travel from a worker to the training process with all their tensors in one block of shared memory.

A tensor that a worker sends by itself costs a shared-memory file and a conversion in each of the two processes, and a
batch has hundreds of tensors.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64
"""Every tensor starts at a multiple of this number of bytes, as in memory that torch allocates on the CPU."""


@dataclass(frozen=True)
class FlatBatch:
    """A batch, or any object that can be pickled, with its tensors copied into one block.

    Attributes:
        pickled: the pickled object, in which tensors are replaced by their numbers.
        tensors: offset in the block in bytes, type and shape of each tensor.
        block: uint8, one dimension.
    """

    pickled: bytes
    tensors: list[tuple[int, torch.dtype, torch.Size]]
    block: Tensor

    @classmethod
    def flatten(cls, batch: Any) -> "FlatBatch":
        """Copy the tensors of a batch, which must be on the CPU, into a new block."""
        file = io.BytesIO()
        pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
        pickler.dump(batch)
        found = [tensor.detach().contiguous() for tensor in pickler.found]
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in found]
        offsets = [0, *accumulate(sizes)]
        block = torch.empty(offsets[-1], dtype=torch.uint8)
        for offset, tensor in zip(offsets, found, strict=False):
            block[offset : offset + tensor.nbytes] = tensor.flatten().view(torch.uint8)
        pairs = zip(offsets, found, strict=False)
        return cls(file.getvalue(), [(offset, tensor.dtype, tensor.shape) for offset, tensor in pairs], block)

    def restore(self) -> Any:
        """The batch. Nothing is copied: its tensors are views of the block, each with a storage of its own."""
        return _Unpickler(io.BytesIO(self.pickled), cache(self._tensor)).load()

    def pin_memory(self) -> Any:
        """The batch, in pinned memory if its class can do that. The DataLoader calls this."""
        batch = self.restore()
        return batch.pin_memory() if hasattr(batch, "pin_memory") else batch

    def _tensor(self, number: int) -> Tensor:
        offset, dtype, shape = self.tensors[number]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.block.numpy(), dtype=dtype, count=shape.numel(), offset=offset).view(shape)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.found: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        number = self._numbers.setdefault(id(obj), len(self.found))
        if number == len(self.found):
            self.found.append(obj)
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensor: Callable[[int], Tensor]) -> None:
        super().__init__(file)
        self._tensor = tensor

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensor(pid)


@dataclass(frozen=True)
class FlatCollate:
    """A DataLoader's collate function whose batches leave a worker as `FlatBatch`es."""

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        return batch if get_worker_info() is None else FlatBatch.flatten(batch)
