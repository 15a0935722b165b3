"""Users' hooks on parameters: they see a step's whole gradient, once, as in one process.

A pipeline runs one backward per microbatch, in which torch would call them with that microbatch's part, and not at all
where a backward is split. Knows parameters; knows nothing of microbatches or ranks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def silenced(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No hook of these parameters is called inside."""
    saved = [(hooks, dict(hooks)) for parameter in parameters for hooks in _hooks_of(parameter)]
    for hooks, _ in saved:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, known in saved:
            hooks.update(known)


def call(parameters: Iterable[nn.Parameter]) -> None:
    """Call the hooks of each parameter that has a gradient: those on gradients, then those after accumulation."""
    for parameter in parameters:
        for hook in list((parameter._backward_hooks or {}).values()):
            if parameter.grad is not None:
                changed = hook(parameter.grad)
                parameter.grad = parameter.grad if changed is None else changed
        for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
            if parameter.grad is not None:
                hook(parameter)


def _hooks_of(parameter: nn.Parameter) -> list[dict[Any, Any]]:
    found = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
    return [hooks for hooks in found if hooks]
