"""Optimizers of ranks that hold a part of the model, or nothing to train at all.

Knows torch's optimizers; knows nothing of pipelines.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@contextmanager
def accepting_nothing() -> Iterator[None]:
    """Inside, an optimizer may be given an empty list of parameters, which torch takes for a mistake: other ranks have
    some. It has one empty group then, so that schedulers find what they look for."""
    original = Optimizer.__init__

    def init(self: Optimizer, params: Any, defaults: dict[str, Any]) -> None:
        given = params if isinstance(params, Tensor) else list(params)
        original(self, given if isinstance(given, Tensor) or given else [{"params": []}], defaults)

    Optimizer.__init__ = init
    try:
        yield
    finally:
        Optimizer.__init__ = original
