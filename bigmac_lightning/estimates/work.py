"""Estimates of what a forward takes: multiplications, and numbers kept for the backward.

Knows matrices and how many tokens meet them; knows nothing of schedules, ranks or precision.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Work:
    """Of a forward.

    Attributes:
        multiplications: each with its addition, so two floating-point operations.
        kept: numbers that the backward needs: what goes into and comes out of every matrix. Attention's probabilities
            do not count, as fused attention makes them again.
    """

    multiplications: float = 0.0
    kept: float = 0.0

    def checkpointed(self, layers: int, width: float, tokens: float) -> "Work":
        """Of layers that keep their inputs alone, and one of them, run again, all that it needs."""
        return Work(self.multiplications, layers * width * tokens + self.kept / layers)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.multiplications + other.multiplications, self.kept + other.kept)

    def __mul__(self, times: float) -> "Work":
        return Work(self.multiplications * times, self.kept * times)


def work_of(module: nn.Module, tokens: float | Callable[[str], float] = 1.0) -> Work:
    """Of a module's matrices and convolutions, tables of embeddings left out.

    Args:
        tokens: how many rows meet each of them; or a function of the parameter's name.
    """
    total = Work()
    for name, matrix in _matrices(module):
        ends = matrix.shape[0] + matrix.numel() // matrix.shape[0]
        times = tokens(name) if callable(tokens) else tokens
        total += Work(matrix.numel(), ends) * times
    return total


def attention_work(width: float, queries: float, keys: float) -> Work:
    """Of attention itself: scores and weighted sums.

    Args:
        width: heads * width of a head.
        queries, keys: how many; keys as seen by the mean query.
    """
    return Work(2.0 * width * queries * keys)


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in tables:
            yield name, parameter
