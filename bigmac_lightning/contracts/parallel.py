"""The ranks that compute a stage together, and what a language model has to know about them."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ParallelSizes:
    """Over how many ranks the work of one stage is divided.

    Attributes:
        tensor: number of ranks that have slices of the same weights and compute the same tokens.
        context: number of ranks that have slices of the same rows and the same weights.
        expert: number of ranks that the experts of a mixture are spread over; 1: every rank has all experts.
    """

    tensor: int = 1
    context: int = 1
    expert: int = 1

    @property
    def peers(self) -> int:
        """Number of processes that compute a stage together."""
        return self.tensor * self.context


@dataclass(frozen=True)
class StagePeers:
    """The ranks that compute a stage together, as one of them sees them.

    Attributes:
        tensor: mesh of one dimension, whose name is "tp"; ``None`` without tensor parallelism.
        context: mesh of one dimension; ``None`` without context parallelism. Rank c has the c-th slice of each row.
        expert: mesh of one dimension; ``None`` without expert parallelism.
        experts_see_same_tokens: whether the ranks of `expert` compute the same tokens, as those of `tensor` do.
    """

    tensor: DeviceMesh | None = None
    context: DeviceMesh | None = None
    expert: DeviceMesh | None = None
    experts_see_same_tokens: bool = False
