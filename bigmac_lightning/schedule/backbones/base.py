"""What a backbone is: a pure function that gives every rank's LLM actions in order, and where the stages live.

Knows nothing of encoders, generators or costs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bigmac_lightning.schedule.action import Action

Orders = list[list[Action]]
"""Per rank, its actions in order."""


def round_robin(pipeline_parallel_size: int, virtual_stages: int) -> list[int]:
    """Stage s lives on rank s modulo P."""
    return [stage % pipeline_parallel_size for stage in range(pipeline_parallel_size * virtual_stages)]


def v_shape(pipeline_parallel_size: int, virtual_stages: int) -> list[int]:
    """Stages go down the ranks and back up: the first and the last of two live on rank 0."""
    down = list(range(pipeline_parallel_size))
    return [rank for chunk in range(virtual_stages) for rank in (down[::-1] if chunk % 2 else down)]


@dataclass(frozen=True)
class Backbone:
    """An LLM-only schedule.

    Attributes:
        builder: called with pipeline_parallel_size, microbatches and virtual_stages; gives every rank's actions.
            Each stage's forwards come in the order of the microbatches.
        virtual_stages: the numbers of stages per rank that it allows.
        stage_rank: from pipeline_parallel_size and virtual_stages, the rank of each stage.
    """

    builder: Callable[[int, int, int], Orders]
    virtual_stages: Sequence[int] = (1,)
    stage_rank: Callable[[int, int], list[int]] = round_robin

    def build(
        self, pipeline_parallel_size: int, microbatches: int, extra_in_flight: int = 0, virtual_stages: int = 1
    ) -> Orders:
        """Every rank's actions in order.

        More microbatches in flight are had from the order of that many more microbatches: its backward of
        microbatch m + extra_in_flight becomes that of m. This breaks no dependency, as a stage's forward of m comes
        before that of m + extra_in_flight.

        Args:
            pipeline_parallel_size: number of ranks.
            microbatches: number of microbatches, at least 1.
            extra_in_flight: how many more microbatches are forwarded before the first backward.
            virtual_stages: stages per rank.

        Raises:
            ValueError: if this backbone does not allow so many stages per rank.
        """
        self.check_virtual_stages(virtual_stages)
        orders = self.builder(pipeline_parallel_size, microbatches + extra_in_flight, virtual_stages)
        if not extra_in_flight:
            return orders
        earlier = [
            [replace(a, index=a.index if a.kind == "F" else a.index - extra_in_flight) for a in actions]
            for actions in orders
        ]
        return [[action for action in actions if 0 <= action.index < microbatches] for actions in earlier]

    def check_virtual_stages(self, number: int) -> None:
        """Refuse a number of stages per rank that this backbone does not allow; raises ``ValueError``."""
        first, last = self.virtual_stages[0], self.virtual_stages[-1]
        if number not in self.virtual_stages:
            allowed = str(first) if first == last else f"{first} to {last}"
            raise ValueError(f"virtual_stages is {number}; this backbone allows {allowed}")
