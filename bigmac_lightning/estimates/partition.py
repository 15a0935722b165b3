"""The cut of the LLM's layers into stages: in equal numbers, balanced by estimated cost, or as the user gives it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

Partition = Literal["even", "auto"] | tuple[int, ...]
"""Nearly equal numbers of layers ("even"), stages balanced by cost ("auto"), or the number of layers of each stage."""


@dataclass(frozen=True)
class LayerCosts:
    """The time or the memory that the parts of the LLM take, in any unit.

    Attributes:
        layers: the cost of each layer.
        embedding: the cost of the embedding, which the first stage has besides its layers.
        head: the cost of final norm and output weight, which the last stage has besides its layers.
    """

    layers: tuple[float, ...]
    embedding: float = 0.0
    head: float = 0.0

    def of(self, stage: range) -> float:
        """The cost of a stage."""
        first = self.embedding if stage.start == 0 else 0.0
        last = self.head if stage.stop == len(self.layers) else 0.0
        return sum(self.layers[stage.start : stage.stop]) + first + last

    @property
    def parts(self) -> tuple[float, ...]:
        """The costs in the order in which a token meets the parts: embedding, layers, head."""
        return (self.embedding, *self.layers, self.head)

    @classmethod
    def of_parts(cls, parts: Sequence[float]) -> "LayerCosts":
        return cls(tuple(parts[1:-1]), parts[0], parts[-1])


@dataclass(frozen=True)
class TrainedLayers:
    """Which weights of the LLM are trained, as far as it changes how long a stage takes.

    Attributes:
        shares: the share of the weights that is trained, for each part: embedding, layers, head.
        below: whether gradients have to reach what lies below the LLM (an encoder), or adapters in all layers.
        recomputed: whether the backward of a layer runs its forward again.
    """

    shares: tuple[float, ...]
    below: bool = False
    recomputed: bool = False

    @classmethod
    def all(cls, layers: int) -> "TrainedLayers":
        return cls((1.0,) * (layers + 2))

    @property
    def passes(self) -> tuple[bool, ...]:
        """Whether each part has a backward. Gradients go down to the lowest trained part, and no further."""
        return tuple(accumulate((share > 0 for share in self.shares), lambda a, b: a or b, initial=self.below))[1:]

    def times(self, forward: LayerCosts) -> tuple[LayerCosts, LayerCosts, LayerCosts]:
        """The times of forward, input gradients and weight gradients. Each takes as many multiplications as the
        forward; the forward that checkpointed layers run again counts with the input gradients."""
        again = (False, *[self.recomputed] * len(forward.layers), False)
        rows = list(zip(forward.parts, self.passes, self.shares, again, strict=True))
        inputs = [cost * passed * (1 + recomputed) for cost, passed, _, recomputed in rows]
        weights = [cost * share for cost, _, share, _ in rows]
        return forward, LayerCosts.of_parts(inputs), LayerCosts.of_parts(weights)

    def step(self, forward: LayerCosts) -> LayerCosts:
        """The time of forward and backward together."""
        columns = zip(*(costs.parts for costs in self.times(forward)), strict=True)
        return LayerCosts.of_parts([sum(column) for column in columns])


def make_stages(costs: LayerCosts, stages: int, partition: Partition = "even") -> list[range]:
    """Cut the layers into consecutive stages, none empty.

    Raises:
        ValueError: there are more stages than layers, or the given numbers of layers do not fit.
    """
    layers = len(costs.layers)
    if stages > layers:
        raise ValueError(
            f"the LLM has {layers} layers, too few for {stages} pipeline stages: "
            f"choose pipeline_parallel_size * virtual_stages <= {layers}, or a deeper LLM"
        )
    if partition == "auto":
        return list(_balanced(costs, stages))
    if partition == "even":  # earlier stages take the remainder, because the last one has the head besides
        bounds = [-(-layers * s // stages) for s in range(stages + 1)]
    else:
        if len(partition) != stages or sum(partition) != layers or min(partition) < 1:
            raise ValueError(
                f"partition={list(partition)} does not fit: {stages} stages of at least one layer must have "
                f"{layers} layers together"
            )
        bounds = [sum(partition[:s]) for s in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


@lru_cache(maxsize=256)
def _balanced(costs: LayerCosts, stages: int) -> Sequence[range]:
    """The cut whose most expensive stage is cheapest; among those cuts, the one with the least sum of squares.

    Dynamic programming over the layers: after each stage, `best` has for every number of layers so far the best cut of
    these layers, as (cost of its most expensive stage, sum of squares, stages).
    """
    layers = len(costs.layers)
    best: dict[int, tuple[float, float, list[range]]] = {0: (0.0, 0.0, [])}
    for stage in range(1, stages + 1):
        ends = [layers] if stage == stages else range(stage, layers - (stages - stage) + 1)
        extended: dict[int, tuple[float, float, list[range]]] = {}
        for end in ends:
            chosen, key = 0, (math.inf, math.inf)
            for start, (worst, squares, _) in best.items():
                if start < end:
                    cost = costs.of(range(start, end))
                    key, chosen = min((key, chosen), ((max(worst, cost), squares + cost**2), start))
            extended[end] = (*key, [*best[chosen][2], range(chosen, end)])
        best = extended
    return best[layers][2]
