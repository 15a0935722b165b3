"""Calls the hooks that users registered on parameters, once per step and with the whole gradient, as in one process.

A pipeline runs one backward per microbatch. torch would call the hooks in each of them with that microbatch's part of
the gradient, and would not call them where a backward is split. Therefore the hooks are removed during the step and
called afterwards.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def disabled(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Remove the hooks of these parameters inside the block."""
    saved = [(hooks, dict(hooks)) for parameter in parameters for hooks in _hooks_of(parameter)]
    for hooks, _ in saved:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, copy in saved:
            hooks.update(copy)


def call(parameters: Iterable[nn.Parameter]) -> None:
    """Call the hooks of each parameter that has a gradient: first those of ``register_hook``, which may replace the
    gradient, then those of ``register_post_accumulate_grad_hook``."""
    for parameter in parameters:
        for hook in list((parameter._backward_hooks or {}).values()):
            if parameter.grad is not None:
                changed = hook(parameter.grad)
                parameter.grad = parameter.grad if changed is None else changed
        for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
            if parameter.grad is not None:
                hook(parameter)


def _hooks_of(parameter: nn.Parameter) -> list[dict[Any, Any]]:
    """Return torch's own dictionaries of the parameter's hooks; changing one changes the parameter's hooks."""
    found = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
    return [hooks for hooks in found if hooks]
