"""A backbone: a pure function that builds every rank's LLM actions in order, and the rank of each stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bigmac_lightning.schedule.action import Action

Orders = list[list[Action]]
"""Per rank, its list of actions in order."""


def round_robin(pipeline_parallel_size: int, virtual_stages: int) -> list[int]:
    """Return the rank of each stage, where stage s is on rank s modulo P."""
    return [stage % pipeline_parallel_size for stage in range(pipeline_parallel_size * virtual_stages)]


def v_shape(pipeline_parallel_size: int, virtual_stages: int) -> list[int]:
    """Return the rank of each stage, where the stages run down the ranks and back up. With two stages per rank, the
    first and the last stage are both on rank 0."""
    down = list(range(pipeline_parallel_size))
    return [rank for chunk in range(virtual_stages) for rank in (down[::-1] if chunk % 2 else down)]


@dataclass(frozen=True)
class Backbone:
    """An LLM-only schedule.

    Attributes:
        builder: function that takes pipeline_parallel_size, microbatches and virtual_stages, and returns every rank's
            actions. Each stage must forward the microbatches in their order.
        virtual_stages: allowed numbers of stages per rank, in ascending order.
        stage_rank: function that takes pipeline_parallel_size and virtual_stages, and returns the rank of each stage.
        splits: whether backwards are cut into I and W.
    """

    builder: Callable[[int, int, int], Orders]
    virtual_stages: Sequence[int] = (1,)
    stage_rank: Callable[[int, int], list[int]] = round_robin
    splits: bool = False

    def build(
        self, pipeline_parallel_size: int, microbatches: int, extra_in_flight: int = 0, virtual_stages: int = 1
    ) -> Orders:
        """Return every rank's actions in order.

        For more microbatches in flight, this takes the order of M + extra_in_flight microbatches and renumbers its
        backwards: the backward of microbatch m + extra_in_flight becomes that of m, and actions of microbatches outside
        0 .. M - 1 are left out. Each backward is then as many microbatches later than in the backbone. No dependency
        breaks, because a stage forwards m before m + extra_in_flight.

        Args:
            pipeline_parallel_size: number of ranks.
            microbatches: number of microbatches, M, at least 1.
            extra_in_flight: number of microbatches that are forwarded before the first backward in addition to those of
                the backbone.
            virtual_stages: number of stages per rank.

        Raises:
            ValueError: this backbone does not allow this number of stages per rank.
        """
        self.check_virtual_stages(virtual_stages)
        orders = self.builder(pipeline_parallel_size, microbatches + extra_in_flight, virtual_stages)
        if not extra_in_flight:
            return orders
        renumbered = [
            [replace(a, index=a.index if a.kind == "F" else a.index - extra_in_flight) for a in actions]
            for actions in orders
        ]
        return [[action for action in actions if 0 <= action.index < microbatches] for actions in renumbered]

    def check_virtual_stages(self, number: int) -> None:
        """Raise ``ValueError`` if this backbone does not allow this number of stages per rank."""
        first, last = self.virtual_stages[0], self.virtual_stages[-1]
        if number not in self.virtual_stages:
            allowed = str(first) if first == last else f"{first} to {last}"
            raise ValueError(f"virtual_stages is {number}; this backbone allows {allowed}")
