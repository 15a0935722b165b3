"""Autocast over a step of many actions: every weight is cast once, not once in every action.

Autocast keeps what it has cast until its outermost context ends. With a context around each action, every microbatch in
flight would keep copies of its own of a stage's weights. Knows torch's autocast; knows nothing of actions.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial

import torch


@contextmanager
def one_cache(device: torch.device) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Casts are kept until the block ends. Inside, autocast is off, as it has to be in a backward.

    Yields: contexts in which autocast is as the caller had it, to be entered around each forward.
    """
    kind = device.type
    wanted: Callable[[], AbstractContextManager[object]] = nullcontext
    if torch.is_autocast_enabled(kind):
        wanted = partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind))
    elif not _keeps_graphs(kind):
        yield wanted
        return
    with torch.autocast(kind, enabled=False):
        yield wanted


@cache
def _keeps_graphs(kind: str) -> bool:
    """Whether a cast that is made and kept without gradients still leads to the weight when there are gradients: torch
    had versions in which it did not, so that the weight's gradient was lost."""
    weight = torch.ones(1, 1, device=kind, requires_grad=True)
    with torch.autocast(kind, enabled=False):
        for grad in (False, True):
            with torch.autocast(kind, dtype=torch.bfloat16), torch.set_grad_enabled(grad):
                product = weight @ weight.new_ones(1, 1)
    return product.requires_grad
