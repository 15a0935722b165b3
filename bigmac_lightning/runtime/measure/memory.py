"""Counts the activation bytes that autograd keeps alive, per component, by saved-tensor hooks.

A storage counts once however often it is saved; parameters do not count. Bytes are freed when the graph is.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class _Saved:
    """A saved tensor; its death is the release of its bytes."""

    __slots__ = ("release", "tensor")

    def __init__(self, tensor: Tensor, release: Callable[[], None]) -> None:
        self.tensor, self.release = tensor, release

    def __del__(self) -> None:
        self.release()


class MemoryTracker:
    """Live and peak bytes per component.

    Attributes:
        live: bytes alive now, by component.
        peak: the most that was alive since `reset_peak`, by component.
        curve: (seconds, component, bytes alive) at each change, filled only while `recording`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        self._ignored = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._references: dict[tuple[str, int], int] = {}
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.curve: list[tuple[float, str, int]] = []
        self.recording = False

    def reset_peak(self) -> None:
        self.peak = dict(self.live)
        self.curve = []

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Count what is saved for backward inside this block under `name`."""

        def pack(tensor: Tensor) -> _Saved | Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._ignored:
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
