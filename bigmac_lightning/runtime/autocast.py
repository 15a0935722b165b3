"""Autocast for a step of many actions, such that each weight is cast once per step and not once per action.

torch's autocast caches the cast weights until its outermost context ends. With a separate context around each action,
every microbatch in flight would save its own cast copy of a stage's weights. Therefore one outer context spans the
whole step.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial

import torch


@contextmanager
def one_cache(device: torch.device) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Cache cast weights until the block ends. Autocast is off inside the block, because backwards must run without it.

    Yields: a function that returns a context in which autocast is as it was before the block; each forward must enter
        one.
    """
    kind = device.type
    as_before: Callable[[], AbstractContextManager[object]] = nullcontext
    if torch.is_autocast_enabled(kind):
        as_before = partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind))
    elif not _keeps_graphs(kind):
        # The model may use autocast itself. Its casts are then not cached over the step, as gradients could be lost.
        yield as_before
        return
    with torch.autocast(kind, enabled=False):
        yield as_before


@cache
def _keeps_graphs(kind: str) -> bool:
    """Whether a weight gets its gradient although its cast copy was cached while gradients were off.

    In some versions of torch the cached copy has no graph then, and the weight's gradient is lost without an error.
    This function tries it.
    """
    weight = torch.ones(1, 1, device=kind, requires_grad=True)
    with torch.autocast(kind, enabled=False):
        for grad in (False, True):
            with torch.autocast(kind, dtype=torch.bfloat16), torch.set_grad_enabled(grad):
                product = weight @ weight.new_ones(1, 1)
    return product.requires_grad
