"""Which layers make which stage: evenly, by estimated cost, or as the user says.

Pure arithmetic on layers' costs; knows no tensors, ranks or configs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

Partition = Literal["even", "auto"] | tuple[int, ...]
"""Nearly equal numbers of layers; balanced by cost; or the number of layers of each stage."""


@dataclass(frozen=True)
class LayerCosts:
    """What the LLM's parts take, time or memory, in any unit.

    Attributes:
        layers: of each layer.
        embedding: of what the first stage does besides.
        head: of what the last stage does besides.
    """

    layers: tuple[float, ...]
    embedding: float = 0.0
    head: float = 0.0

    def of(self, stage: range) -> float:
        """Of a stage."""
        first = self.embedding if stage.start == 0 else 0.0
        last = self.head if stage.stop == len(self.layers) else 0.0
        return sum(self.layers[stage.start : stage.stop]) + first + last

    @property
    def parts(self) -> tuple[float, ...]:
        """From the embedding to the head."""
        return (self.embedding, *self.layers, self.head)

    @classmethod
    def of_parts(cls, parts: Sequence[float]) -> "LayerCosts":
        return cls(tuple(parts[1:-1]), parts[0], parts[-1])


@dataclass(frozen=True)
class TrainedLayers:
    """What of the LLM is trained, as far as it changes how long a stage takes.

    Attributes:
        shares: the share of the weights of each part (embedding, layers, head) that is trained.
        below: whether gradients have to go all the way down: to an encoder, or to adapters in all layers.
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
        """Whether each part has a backward: gradients go no further down than to the lowest part that is trained."""
        return tuple(accumulate((share > 0 for share in self.shares), lambda a, b: a or b, initial=self.below))[1:]

    def times(self, forward: LayerCosts) -> tuple[LayerCosts, LayerCosts, LayerCosts]:
        """Of forward, input gradients and weight gradients, each of which takes as many multiplications as the forward;
        what is recomputed counts with the input gradients."""
        again = (False, *[self.recomputed] * len(forward.layers), False)
        rows = list(zip(forward.parts, self.passes, self.shares, again, strict=True))
        inputs = [cost * passed * (1 + recomputed) for cost, passed, _, recomputed in rows]
        weights = [cost * share for cost, _, share, _ in rows]
        return forward, LayerCosts.of_parts(inputs), LayerCosts.of_parts(weights)

    def step(self, forward: LayerCosts) -> LayerCosts:
        """Forward and backward together."""
        columns = zip(*(costs.parts for costs in self.times(forward)), strict=True)
        return LayerCosts.of_parts([sum(column) for column in columns])


def make_stages(costs: LayerCosts, stages: int, partition: Partition = "even") -> list[range]:
    """Cut the layers into consecutive stages, none empty.

    Raises:
        ValueError: more stages than layers, or numbers of layers that do not fit.
    """
    layers = len(costs.layers)
    if stages > layers:
        raise ValueError(
            f"the LLM has {layers} layers, too few for {stages} pipeline stages: "
            f"choose pipeline_parallel_size * virtual_stages <= {layers}, or a deeper LLM"
        )
    if partition == "auto":
        return _balanced(costs, stages)
    if partition == "even":  # earlier stages take the remainder: the last one has the head
        bounds = [-(-layers * s // stages) for s in range(stages + 1)]
    else:
        if len(partition) != stages or sum(partition) != layers or min(partition) < 1:
            raise ValueError(
                f"partition={list(partition)} does not fit: {stages} stages of at least one layer must have "
                f"{layers} layers together"
            )
        bounds = [sum(partition[:s]) for s in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def _balanced(costs: LayerCosts, stages: int) -> list[range]:
    """The cut whose dearest stage is cheapest; among those, the one with the least sum of squares."""
    layers = len(costs.layers)
    best: dict[int, tuple[float, float, list[range]]] = {0: (0.0, 0.0, [])}  # by number of layers already cut
    for stage in range(1, stages + 1):
        ends = [layers] if stage == stages else range(stage, layers - (stages - stage) + 1)
        extended: dict[int, tuple[float, float, list[range]]] = {}
        for end in ends:
            choices: list[tuple[float, float, list[range]]] = []
            for start, (worst, squares, cut) in best.items():
                if start < end:
                    cost = costs.of(range(start, end))
                    choices.append((max(worst, cost), squares + cost**2, [*cut, range(start, end)]))
            extended[end] = min(choices, key=lambda choice: choice[:2])
        best = extended
    return best[layers][2]
