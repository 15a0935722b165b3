"""Which layers make which stage: evenly, by estimated cost, or as the user says.

Pure arithmetic on layers' costs; knows no tensors, ranks or configs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Partition = Literal["even", "auto"] | tuple[int, ...]
"""Nearly equal numbers of layers; balanced by cost; or the number of layers of each stage."""


@dataclass(frozen=True)
class LayerCosts:
    """Estimated forward time of the LLM's parts, in any unit.

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


def make_stages(costs: LayerCosts, stages: int, partition: Partition = "even") -> list[range]:
    """Cut the layers into consecutive stages, none empty.

    Raises:
        ValueError: more stages than layers, or numbers of layers that do not fit.
    """
    layers = len(costs.layers)
    if stages > layers:
        raise ValueError(
            f"the LLM has {layers} layers, too few for {stages} pipeline stages: "
            f"choose pipeline_parallel_size <= {layers} or a deeper LLM"
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


def describe(stages: Sequence[range], stage_rank: Sequence[int], costs: LayerCosts) -> str:
    """A table, one line for each stage: rank, layers, and its share of the LLM's estimated time."""
    whole = sum(costs.of(stage) for stage in stages)
    lines = ["stage  rank  layers      of the LLM's time"]
    for s, (stage, rank) in enumerate(zip(stages, stage_rank, strict=True)):
        layers = f"{stage.start}..{stage.stop - 1}"
        lines.append(f"{s:>5}  {rank:>4}  {layers:<10}  {costs.of(stage) / whole:.1%}")
    return "\n".join(lines)
