"""A backward in two halves: input gradients now (I), weight gradients later (W).

The one place that uses torch.distributed.pipelining's `_backward` (no public name; torch's range is pinned). Where a
graph cannot be split, one half does everything, so that no gradient is ever lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight


@dataclass
class Deferred:
    """What the weight half of a backward still has to do.

    Attributes:
        parameter_groups: intermediate gradients, from the input half; ``None``: nothing was done yet.
        roots, gradients: where the whole backward starts, if nothing was done yet.
    """

    parameter_groups: list[dict[str, Any]] | None
    roots: list[Tensor]
    gradients: list[Tensor | None]


def can_split(roots: Sequence[Tensor], weights: Sequence[nn.Parameter]) -> bool:
    """Whether a graph's backward can be split, and gains by it.

    It cannot if a weight occurs more than once (tied, or a shared norm). It does not gain if activations are
    checkpointed: each half would recompute them.
    """
    known = {id(weight) for weight in weights}
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    leaves: set[object] = set()
    while waiting:
        taken = waiting.pop()
        if _is_checkpointed(taken):
            return False
        for node, _ in taken.next_functions:
            if node is None:
                continue
            variable = getattr(node, "variable", None)  # of the nodes where leaves' gradients are accumulated
            if id(variable) in known:
                if node in leaves:
                    return False
                leaves.add(node)
            elif node not in seen:
                seen.add(node)
                waiting.append(node)
    return True


def _is_checkpointed(node: Any) -> bool:
    """Whether what this node saved belongs to torch.utils.checkpoint, reentrant or not."""
    if node.name() == "CheckpointFunctionBackward":
        return True
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for tensor in saved if isinstance(saved, tuple | list) else (saved,):
                hook = tensor.unpack_hook
                if hook is not None and hook.__module__ == "torch.utils.checkpoint":
                    return True
    return False


def backward_input(
    roots: list[Tensor],
    gradients: list[Tensor | None],
    inputs: Sequence[Tensor],
    weights: Sequence[nn.Parameter],
) -> Deferred | None:
    """Compute the gradients of `inputs` (into their ``.grad``) and keep what the weights' gradients need.

    Args:
        roots, gradients: as of ``torch.autograd.backward``; a scalar's gradient may be ``None``.
        inputs: leaves that need a gradient. Empty (the first stage without a trained encoder): all is left for later,
            as the split would lose the weights' gradients.
        weights: parameters whose gradients may wait. Empty: nothing is left for later.
    """
    if not inputs:
        return Deferred(None, roots, gradients)
    if not weights:
        torch.autograd.backward(roots, gradients)
        return None
    given = [torch.ones_like(r) if g is None else g for r, g in zip(roots, gradients, strict=True)]
    roots = [root.clone() if root._is_view() else root for root in roots]  # views cannot be detached in place
    _, parameter_groups = stage_backward_input(roots, given, list(inputs), iter(weights))
    return Deferred(parameter_groups, [], [])


def backward_weight(deferred: Deferred, weights: Sequence[nn.Parameter]) -> None:
    """Compute the gradients of `weights`, adding to their ``.grad``."""
    if deferred.parameter_groups is None:
        if deferred.roots:
            torch.autograd.backward(deferred.roots, deferred.gradients)
        return
    stage_backward_weight(iter(weights), deferred.parameter_groups)
