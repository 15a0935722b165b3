"""Estimates of a forward on the meta device: multiplications, and the numbers that its backward needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ForwardCost:
    """The cost of a forward.

    Attributes:
        multiplications: each counts with its addition, so that it stands for two floating-point operations.
        activations: numbers that are saved for the backward: the inputs and outputs of every matrix. The probabilities
            of attention are not among them, because fused attention computes them again.
    """

    multiplications: float = 0.0
    activations: float = 0.0

    def checkpointed(self, layers: int, width: float, tokens: float) -> "ForwardCost":
        """The cost under gradient checkpointing: every layer saves only its input, and the one layer that runs again
        at a time has all of its activations.

        Args:
            layers: the number of equal layers.
            width: the numbers that a layer's input has per token.
            tokens: the tokens of the input.
        """
        return ForwardCost(self.multiplications, layers * width * tokens + self.activations / layers)

    def __add__(self, other: "ForwardCost") -> "ForwardCost":
        return ForwardCost(self.multiplications + other.multiplications, self.activations + other.activations)

    def __mul__(self, times: float) -> "ForwardCost":
        return ForwardCost(self.multiplications * times, self.activations * times)


def forward_cost(module: nn.Module, rows: float | Callable[[str], float] = 1.0) -> ForwardCost:
    """The cost of a module's matrices and convolutions. Looking up an embedding multiplies nothing and costs nothing.

    Args:
        rows: the number of rows (tokens, patches) that each matrix multiplies; or a function that gives the number for
            a parameter's name.
    """
    total = ForwardCost()
    for name, matrix in _matrices(module):
        inputs_and_outputs = matrix.shape[0] + matrix.numel() // matrix.shape[0]
        times = rows(name) if callable(rows) else rows
        total += ForwardCost(matrix.numel(), inputs_and_outputs) * times
    return total


def attention_cost(width: float, queries: float, keys: float) -> ForwardCost:
    """The cost of the scores and of the weighted sums; projections are matrices and count there.

    Args:
        width: the number of heads times the width of a head.
        queries: the number of queries.
        keys: the number of keys that the mean query attends to.
    """
    return ForwardCost(2.0 * width * queries * keys)


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in embeddings:
            yield name, parameter
