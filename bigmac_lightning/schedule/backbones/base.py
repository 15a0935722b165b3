"""What a backbone is: a pure function that gives every rank's LLM actions in order, and where the stages live.

Knows nothing of encoders, generators or costs.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass

from bigmac_lightning.schedule.action import Action

Orders = list[list[Action]]
"""Per rank, its actions in order."""


def round_robin(pipeline_parallel_size: int, virtual_stages: int) -> list[int]:
    """Stage s lives on rank s modulo P."""
    return [stage % pipeline_parallel_size for stage in range(pipeline_parallel_size * virtual_stages)]


@dataclass(frozen=True)
class Backbone:
    """An LLM-only schedule.

    Attributes:
        builder: called with pipeline_parallel_size, microbatches and extra_in_flight, and with virtual_stages as a
            fourth argument if the backbone allows more than one kind; gives every rank's actions.
        virtual_stages: the numbers of stages per rank that it allows.
        stage_rank: from pipeline_parallel_size and virtual_stages, the rank of each stage.
    """

    builder: Callable[..., Orders]
    virtual_stages: Container[int] = (1,)
    stage_rank: Callable[[int, int], list[int]] = round_robin

    def build(
        self, pipeline_parallel_size: int, microbatches: int, extra_in_flight: int = 0, virtual_stages: int = 1
    ) -> Orders:
        """Every rank's actions in order.

        Args:
            pipeline_parallel_size: number of ranks.
            microbatches: number of microbatches, at least 1.
            extra_in_flight: how many more forwards each rank does before its first backward.
            virtual_stages: stages per rank.

        Raises:
            ValueError: if this backbone does not allow so many stages per rank.
        """
        if virtual_stages not in self.virtual_stages:
            raise ValueError(f"virtual_stages is {virtual_stages}; this backbone allows {self.virtual_stages}")
        arguments = (pipeline_parallel_size, microbatches, extra_in_flight)
        if self.virtual_stages == (1,):
            return self.builder(*arguments)
        return self.builder(*arguments, virtual_stages)
