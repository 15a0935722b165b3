"""A batch on its way from a worker to the training process: all its tensors in one block of shared memory.

A tensor that travels alone costs a file and a conversation between two processes; a batch has hundreds. Knows tensors
and pickle; knows nothing of what a batch is.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64
"""Bytes: every tensor starts at a multiple."""


@dataclass(frozen=True)
class Parcel:
    """Anything that can be pickled, its tensors aside.

    Attributes:
        contents: the pickled rest, tensors by their number.
        tensors: offset in the block, type and shape of each.
        block: uint8.
    """

    contents: bytes
    tensors: list[tuple[int, torch.dtype, torch.Size]]
    block: Tensor

    @classmethod
    def pack(cls, contents: Any) -> "Parcel":
        """Tensors of the CPU are copied."""
        file = io.BytesIO()
        pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
        pickler.dump(contents)
        found = [tensor.detach().contiguous() for tensor in pickler.found]
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in found]
        offsets = [0, *accumulate(sizes)]
        block = torch.empty(offsets[-1], dtype=torch.uint8)
        for offset, tensor in zip(offsets, found, strict=False):
            block[offset : offset + tensor.nbytes] = tensor.flatten().view(torch.uint8)
        places = zip(offsets, found, strict=False)
        return cls(file.getvalue(), [(offset, tensor.dtype, tensor.shape) for offset, tensor in places], block)

    def open(self) -> Any:
        """What was packed. Nothing is copied: its tensors lie in the block, each with a storage of its own."""
        return _Unpickler(io.BytesIO(self.contents), self._tensor).load()

    def pin_memory(self) -> Any:
        """What was packed, in pinned memory if it can be (called by the DataLoader)."""
        contents = self.open()
        return contents.pin_memory() if hasattr(contents, "pin_memory") else contents

    def _tensor(self, number: int) -> Tensor:
        offset, dtype, shape = self.tensors[number]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.block.numpy(), dtype=dtype, count=shape.numel(), offset=offset).view(shape)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.found: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.found.append(obj)
        return len(self.found) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensor: Callable[[int], Tensor]) -> None:
        super().__init__(file)
        self._tensor = tensor

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensor(pid)


@dataclass(frozen=True)
class ParcelCollate:
    """A DataLoader's collate function whose results leave a worker as a `Parcel`."""

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        made = self.collate(samples)
        return made if get_worker_info() is None else Parcel.pack(made)
