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

Structure = tuple[object, ...]
"""The names of a graph's nodes in a fixed order, the positions of the nodes that each passes gradients to, and the
positions of outputs and inputs. Graphs with equal structures can be split at the same positions."""

Split = tuple[tuple[int, tuple[int, ...]], ...]
"""For each group of weights, the position of its node, and the positions of the nodes that accumulate the weights'
gradients."""

Splits = dict[tuple[int, Structure], Split | None]
"""How graphs are split, by stage and structure; ``None`` if they cannot be split. Most graphs of a stage have the same
structure, and to find the groups takes as long as a backward of small layers."""


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
        starts = _next_gradients(group)
        if starts is None:
            starts = [(GradientEdge(group.node, i), g) for i, g in enumerate(group.gradients) if g is not None]
        if starts:
            edges, gradients = [edge for edge, _ in starts], [gradient for _, gradient in starts]
            torch.autograd.backward(edges, gradients, inputs=group.weights)


def _next_gradients(group: _WeightGroup) -> list[tuple[GradientEdge, Tensor]] | None:
    """Compute the gradients that a matrix product or a product with a vector of weights passes on to the weights.

    From a node itself, the engine would walk through the whole graph below it, up to the stage's input, for each group.
    From the nodes after it, it walks to the weights only. The formulas are those of torch's derivatives.yaml.

    Returns: ``None`` for other nodes, and if a path from the node does not lead to one weight alone.
    """
    node: Any = group.node
    name, gradient = node.name(), group.gradients[0] if len(group.gradients) == 1 else None
    known = name in ("MmBackward0", "AddmmBackward0", "MulBackward0")
    if gradient is None or not known or gradient.is_complex():
        return None
    last = len(node.next_functions) - 1
    found: dict[int, Tensor] = {}
    reached: set[int] = set()
    for position, (following, _) in enumerate(node.next_functions):
        is_matrix = name != "MulBackward0" and position == last  # a linear layer's second matrix: its transposed weight
        weight = _only_weight(following, transposed=is_matrix)
        if weight is None or not any(weight is one for one in group.weights):
            continue
        reached.add(id(weight))
        if name == "MulBackward0":
            other = node._saved_other if position == 0 else node._saved_self
            found[position] = (gradient * other).sum_to_size(weight.shape)
        elif is_matrix:
            if name == "AddmmBackward0" and node._saved_alpha != 1:
                return None
            inputs = node._saved_self if name == "MmBackward0" else node._saved_mat1
            found[position] = (gradient.t() @ inputs).t()
        elif name == "AddmmBackward0" and position == 0 and node._saved_beta == 1:
            found[position] = gradient.sum_to_size(weight.shape)
    if not len(found) == len(reached) == len(group.weights):
        return None
    return [(GradientEdge(*node.next_functions[position]), one) for position, one in found.items()]


def _only_weight(node: Any, transposed: bool) -> Tensor | None:
    """The weight that a node leads to over conversions of its type alone, or, if `transposed`, also over
    transpositions; ``None`` if there is no such weight."""
    passed = ("TBackward0", "ToCopyBackward0") if transposed else ("ToCopyBackward0",)
    while node is not None and node.name() in passed:
        ((node, _),) = node.next_functions
    return node.variable if node is not None and hasattr(node, "variable") else None


def _weight_groups(
    edges: Sequence[GradientEdge], inputs: Sequence[Tensor], splits: Splits, stage: int
) -> "list[_WeightGroup] | None":
    """Return the weights of a graph, grouped by the node at which the paths to them leave the paths to the inputs;
    ``None`` if the graph cannot be split."""
    leaves = [get_gradient_edge(leaf).node for leaf in inputs]
    nodes, structure = _structure(edges, leaves)
    key = stage, structure
    if key not in splits:
        splits[key] = _find_split([edge.node for edge in edges], leaves, nodes)
    split = splits[key]
    if split is None:
        return None
    return [_WeightGroup(nodes[node], [nodes[weight].variable for weight in weights]) for node, weights in split]


def _structure(edges: Sequence[GradientEdge], leaves: Sequence[Node]) -> tuple[list[Any], Structure]:
    """Return all nodes of a graph, and its structure."""
    nodes: list[Any] = list(dict.fromkeys(edge.node for edge in edges))
    positions = {node: position for position, node in enumerate(nodes)}
    rows: list[tuple[object, ...]] = []
    for node in nodes:  # the list grows meanwhile
        row: list[object] = [node.name()]
        for following, output in node.next_functions:
            if following is None:
                row.append(None)
                continue
            if following not in positions:
                positions[following] = len(nodes)
                nodes.append(following)
            row += (positions[following], output)
        rows.append(tuple(row))
    starts = tuple((positions[edge.node], edge.output_nr) for edge in edges)
    return nodes, (starts, tuple(positions.get(leaf) for leaf in leaves), tuple(rows))


def _find_split(roots: list[Node], leaves: list[Node], nodes: list[Any]) -> Split | None:
    """Find the groups of weights of a graph; ``None`` if the graph cannot be split."""
    if any(map(_prevents_split, nodes)):
        return None
    reverse = construct_reverse_graph(roots)  # per node, the nodes that pass gradients to it
    weights = [node for node in reverse if hasattr(node, "variable") and node not in leaves]
    found = get_param_groups([leaf for leaf in leaves if leaf in reverse], weights, reverse)
    # If a weight is used more than once, several nodes lead to it, and the weight half would pass the nodes between
    # them again for each. `get_param_groups` also misses weights whose paths share no node with a path to an input.
    single = all(len(group["intermediates"]) == 1 for group in found)
    if not single or sum(len(group["params"]) for group in found) < len(weights):
        return None
    positions = {node: position for position, node in enumerate(nodes)}
    return tuple(
        (positions[next(iter(group["intermediates"]))], tuple(positions[weight] for weight in group["params"]))
        for group in found
    )


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
