"""Counts the bytes of the activations that autograd saves, per component, by saved-tensor hooks.

A storage counts once per component, even if several tensors share it; parameters do not count. Bytes count as freed
when the graph that saved them is freed.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bigmac_lightning.runtime.sharding import local


class _Saved:
    """A saved tensor. It calls `release` when it is deleted, that is, when autograd frees it."""

    __slots__ = ("release", "tensor")

    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor, self.release = tensor, release

    def __del__(self) -> None:
        self.release()


class MemoryTracker:
    """Counts live and peak bytes per component.

    Args:
        parameters: parameters of the model, whose storages are not counted: whole ones, slices or shards.

    Attributes:
        live: by component, the bytes that are alive now.
        peak: by component, the largest number of bytes that were alive at one time since `reset_peak`.
        curve: a triple (seconds of ``time.perf_counter``, component, bytes alive) for each change, while `recording`.
        recording: whether changes are appended to `curve`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        # By the storage, not by its address: weights in shards are whole at other addresses each time.
        self._ignored = {local(parameter).untyped_storage()._cdata for parameter in parameters}
        self._references: dict[tuple[str, int], int] = {}
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.curve: list[tuple[float, str, int]] = []
        self.recording = False

    def reset_peak(self) -> None:
        """Set the peaks to the bytes that are alive now, and empty the curve."""
        self.peak = dict(self.live)
        self.curve = []

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Count the tensors that autograd saves inside this block for the component `name`."""

        def pack(tensor: Tensor) -> _Saved | Tensor:
            storage = local(tensor).untyped_storage()
            if storage._cdata in self._ignored:
                return tensor
            key, size = (name, storage.data_ptr()), storage.nbytes()
            count = self._references.get(key, 0)
            self._references[key] = count + 1
            if count == 0:
                self._change(name, size)
            return _Saved(tensor, partial(self._release, key, size))

        def unpack(saved: _Saved | Tensor) -> Tensor:
            return saved.tensor if isinstance(saved, _Saved) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _release(self, key: tuple[str, int], size: int) -> None:
        self._references[key] -= 1
        if self._references[key] == 0:
            del self._references[key]
            self._change(key[0], -size)

    def _change(self, name: str, size: int) -> None:
        self.live[name] = self.live.get(name, 0) + size
        self.peak[name] = max(self.peak.get(name, 0), self.live[name])
        if self.recording:
            self.curve.append((time.perf_counter(), name, self.live[name]))
