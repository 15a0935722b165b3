"""A backward from gradient edges, whole or in two halves: input gradients now (I), weight gradients later (W).

An edge stands for a tensor that a graph ends in, without holding the tensor's memory. Everything is decided by looking
at the graph at hand, as it may differ from one microbatch to the next. Where a graph cannot be split, one half does
everything, so that no gradient is ever lost.

The one place that uses torch.distributed.pipelining's `_backward` (no public name; torch's range is pinned).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.distributed.pipelining._backward import construct_reverse_graph, get_param_groups

Splits = dict[tuple[int, int], bool]
"""Whether graphs are to be split, by stage and number of nodes: a graph that is made otherwise has another number."""


@dataclass
class Deferred:
    """What the weight half of a backward still has to do.

    Attributes:
        groups: weights, and what is known of the way to them.
        edges, gradients: where the whole backward starts, if nothing was done yet.
    """

    groups: "list[_Group]"
    edges: list[GradientEdge]
    gradients: list[Tensor | None]


@dataclass
class _Group:
    """Weights that hang on one node, and the gradients that have arrived there."""

    node: Node
    weights: list[Tensor]
    arrived: Sequence[Tensor | None] = ()

    def arrive(self, gradients: Sequence[Tensor | None]) -> None:
        self.arrived = gradients


def backward(edges: list[GradientEdge], gradients: list[Tensor | None]) -> None:
    """All gradients, into the leaves' ``.grad``.

    Args:
        edges: where to start; none: there is nothing to do.
        gradients: of each edge; ``None``: the edge is a scalar's, whose gradient is 1.
    """
    if edges:
        torch.autograd.backward(edges, gradients)


def backward_input(
    edges: list[GradientEdge], gradients: list[Tensor | None], inputs: Sequence[Tensor], splits: Splits, stage: int
) -> Deferred | None:
    """Compute the gradients of `inputs` (into their ``.grad``) and keep what the weights' gradients need.

    Args:
        edges, gradients: as of `backward`.
        inputs: leaves that need a gradient. Empty (the first stage without features of a trained encoder): all is left
            for later, as the split would lose the weights' gradients.
        splits: what is known of graphs that came before.
        stage: that the graph is of.

    Returns: ``None`` if the whole backward was done.
    """
    if not edges:
        return None
    if not inputs:
        return Deferred([], edges, gradients)
    groups = _groups(edges, inputs, splits, stage)
    if not groups:
        backward(edges, gradients)
        return None
    handles = [group.node.register_prehook(group.arrive) for group in groups]
    try:
        torch.autograd.backward(edges, gradients, inputs=list(inputs), retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return Deferred(groups, [], [])


def backward_weight(deferred: Deferred) -> None:
    """Compute the weights' gradients, adding to their ``.grad``."""
    backward(deferred.edges, deferred.gradients)
    while deferred.groups:  # what is done is let go
        group = deferred.groups.pop()
        arrived = [(i, gradient) for i, gradient in enumerate(group.arrived) if gradient is not None]
        if arrived:
            edges = [GradientEdge(group.node, i) for i, _ in arrived]
            torch.autograd.backward(edges, [gradient for _, gradient in arrived], inputs=group.weights)


def _groups(
    edges: Sequence[GradientEdge], inputs: Sequence[Tensor], splits: Splits, stage: int
) -> "list[_Group] | None":
    """The weights of a graph by the node on the way to the inputs that they hang on; ``None``: not to be split."""
    roots = [edge.node for edge in edges]
    reverse = construct_reverse_graph(roots)  # by node, where it is come from
    key = stage, len(reverse)
    if key not in splits:
        splits[key] = not any(map(_keeps_together, {*roots, *reverse}))
    if not splits[key]:
        return None
    leaves = [get_gradient_edge(leaf).node for leaf in inputs]
    weights = [node for node in reverse if hasattr(node, "variable") and node not in leaves]
    found = get_param_groups([leaf for leaf in leaves if leaf in reverse], weights, reverse)
    # a weight that is used more than once hangs on several nodes, each of which would run what lies between them again
    single = all(len(group["intermediates"]) == 1 for group in found)
    if not single or sum(len(group["params"]) for group in found) < len(weights):
        splits[key] = False
        return None
    return [_Group(next(iter(g["intermediates"])), [node.variable for node in g["params"]]) for g in found]


def _keeps_together(node: Any) -> bool:
    """Whether this node keeps its graph from being split: it belongs to torch.utils.checkpoint, so that each half would
    recompute the forward; or it is compiled, and gives its memory away the first time that it runs."""
    if node.name().startswith(("CheckpointFunction", "CompiledFunction")):
        return True
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            saved = getattr(node, name)
            for tensor in saved if isinstance(saved, tuple | list) else (saved,):
                hook = tensor.unpack_hook
                if hook is not None and hook.__module__ == "torch.utils.checkpoint":
                    return True
    return False
