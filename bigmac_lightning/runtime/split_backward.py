"""Runs a backward in full, or in two halves: input gradients now (I), weight gradients later (W).

Backwards start from gradient edges. A ``GradientEdge`` names an output of the autograd graph and, unlike the output
tensor, keeps no memory alive except the graph's. Whether a graph can be split is decided for each graph, since graphs
of different microbatches may differ. If it cannot be split, one of the halves does the full backward, so that no
gradient is lost.

The split works as in the zero-bubble schedules of torch.distributed.pipelining. Only this file uses two helpers of its
module `_backward`, which is not public, so pyproject.toml limits the versions of torch. The module's own split backward
is not used, because it loses all weight gradients without an error if no input needs a gradient, and fails on a weight
that is used more than once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.distributed.pipelining._backward import construct_reverse_graph, get_param_groups

Splits = dict[tuple[int, int], bool]
"""Whether a graph can be split, by (stage, number of the graph's nodes). Looking at all nodes takes time, so the result
is reused for graphs of the same stage and size, which the same code has made."""


@dataclass
class Deferred:
    """The part of a backward that the weight half must still run.

    Attributes:
        groups: the weights, and the gradients from which their backward starts.
        edges, gradients: if the input half did nothing, the start of the full backward; otherwise empty.
    """

    groups: "list[_WeightGroup]"
    edges: list[GradientEdge]
    gradients: list[Tensor | None]


@dataclass
class _WeightGroup:
    """Weights whose gradients pass through the same node of the graph.

    Attributes:
        node: the node, which lies on the path to an input.
        weights: the weights.
        gradients: gradients of the node's outputs, recorded when the input half passes the node.
    """

    node: Node
    weights: list[Tensor]
    gradients: Sequence[Tensor | None] = ()

    def record(self, gradients: Sequence[Tensor | None]) -> None:
        self.gradients = gradients


def backward(edges: list[GradientEdge], gradients: list[Tensor | None]) -> None:
    """Run a full backward, which adds to the ``.grad`` of all leaves.

    Args:
        edges: the outputs to start from; without any, nothing is done.
        gradients: gradient of each output; ``None`` for a scalar output, whose gradient is 1.
    """
    if edges:
        torch.autograd.backward(edges, gradients)


def backward_input(
    edges: list[GradientEdge], gradients: list[Tensor | None], inputs: Sequence[Tensor], splits: Splits, stage: int
) -> Deferred | None:
    """Run the input half of a backward, which adds to the ``.grad`` of `inputs` only.

    Args:
        edges, gradients: the start of the backward, as for `backward`.
        inputs: leaves that need a gradient. If there are none (the first stage, without features of a trainable
            encoder), the full backward is left to the weight half.
        splits: results for earlier graphs, which this function extends.
        stage: stage that the graph belongs to.

    Returns: the weight half, for `backward_weight`; ``None`` if the full backward was run because the graph cannot be
        split, or if there was nothing to do.
    """
    if not edges:
        return None
    if not inputs:
        return Deferred([], edges, gradients)
    groups = _weight_groups(edges, inputs, splits, stage)
    if not groups:
        backward(edges, gradients)
        return None
    # The prehooks record the gradients that reach the nodes. The graph is retained, as the weight half starts from
    # them.
    handles = [group.node.register_prehook(group.record) for group in groups]
    try:
        torch.autograd.backward(edges, gradients, inputs=list(inputs), retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return Deferred(groups, [], [])


def backward_weight(deferred: Deferred) -> None:
    """Run the weight half of a backward, which adds to the ``.grad`` of the weights."""
    backward(deferred.edges, deferred.gradients)
    while deferred.groups:  # removing each group when it is done frees its part of the graph
        group = deferred.groups.pop()
        recorded = [(i, gradient) for i, gradient in enumerate(group.gradients) if gradient is not None]
        if recorded:
            edges = [GradientEdge(group.node, i) for i, _ in recorded]
            torch.autograd.backward(edges, [gradient for _, gradient in recorded], inputs=group.weights)


def _weight_groups(
    edges: Sequence[GradientEdge], inputs: Sequence[Tensor], splits: Splits, stage: int
) -> "list[_WeightGroup] | None":
    """Return the weights of a graph, grouped by the node at which the paths to them leave the paths to the inputs;
    ``None`` if the graph cannot be split."""
    roots = [edge.node for edge in edges]
    reverse = construct_reverse_graph(roots)  # per node, the nodes that pass gradients to it
    key = stage, len(reverse)
    if key not in splits:
        splits[key] = not any(map(_prevents_split, {*roots, *reverse}))
    if not splits[key]:
        return None
    leaves = [get_gradient_edge(leaf).node for leaf in inputs]
    weights = [node for node in reverse if hasattr(node, "variable") and node not in leaves]
    found = get_param_groups([leaf for leaf in leaves if leaf in reverse], weights, reverse)
    # If a weight is used more than once, several nodes lead to it, and the weight half would pass the nodes between
    # them again for each. `get_param_groups` also misses weights whose paths share no node with a path to an input.
    single = all(len(group["intermediates"]) == 1 for group in found)
    if not single or sum(len(group["params"]) for group in found) < len(weights):
        splits[key] = False
        return None
    return [_WeightGroup(next(iter(g["intermediates"])), [node.variable for node in g["params"]]) for g in found]


def _prevents_split(node: Any) -> bool:
    """Whether a graph with this node cannot be split.

    A node of torch.utils.checkpoint would recompute its forward in each half. A node of torch.compile frees its saved
    tensors when it runs for the first time, even if the graph is retained.
    """
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
