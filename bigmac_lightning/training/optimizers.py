"""Lets users' `configure_optimizers` run on ranks that have no parameter to train."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@contextmanager
def accepting_nothing() -> Iterator[None]:
    """Within this context, an optimizer accepts an empty list of parameters, which torch refuses as a mistake.

    The optimizer then has one empty parameter group, so that learning rate schedulers find a group.
    """
    original = Optimizer.__init__

    def init(self: Optimizer, params: Any, defaults: dict[str, Any]) -> None:
        given = params if isinstance(params, Tensor) else list(params)
        original(self, given if isinstance(given, Tensor) or given else [{"params": []}], defaults)

    Optimizer.__init__ = init
    try:
        yield
    finally:
        Optimizer.__init__ = original
