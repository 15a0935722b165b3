"""Lets users' `configure_optimizers` run on ranks that have no parameter to train, and their optimizers step whole
weights and shards together."""

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


def step_one_by_one(optimizer: Optimizer) -> None:
    """Let an optimizer step each parameter by itself in groups with shards on different ranks, or shards and others.

    On a GPU, torch would by default step all parameters of a group at once, which it can for one kind only. The setting
    is changed for the step alone, as checkpoints hold it and ranks compare it.
    """
    changed: list[dict[str, Any]] = []

    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            kinds = {getattr(parameter, "device_mesh", None) for parameter in group["params"]}
            if len(kinds) > 1 and group.get("foreach", False) is None:
                group["foreach"] = False
                changed.append(group)

    def after(*_: Any) -> None:
        while changed:
            changed.pop()["foreach"] = None

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
