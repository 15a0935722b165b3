"""What a search may choose: how processes are divided, what lies in shards, and how plans are made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.schedule.backbones import BACKBONES
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import ShardingOptions

SHARDINGS = (
    ShardingOptions(),
    ShardingOptions("zero1", "zero1", "ddp"),
    ShardingOptions("zero1", "zero1", "zero1"),
    ShardingOptions("fsdp", "fsdp", "ddp"),
    ShardingOptions("fsdp", "fsdp", "zero1"),
    ShardingOptions("fsdp", "fsdp", "fsdp"),
)
"""Each needs less memory than those before it, and sends as much or more."""

MOST_VIRTUAL_STAGES = 4
TIMES_OF_TOKENS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""By how much the tokens of a microbatch may differ from those of the config."""

PIECES = (1, 4)


@dataclass(frozen=True)
class Layout:
    """How the processes of a run are divided, and what each of them has.

    Attributes:
        replicas: number of pipelines.
        size: number of ranks of a pipeline.
        parallel: the processes of each rank.
        sharding: what lies in shards.
        tokens: tokens of a microbatch, relative to those of the config.
        checkpointing: whether the LLM's layers save only their inputs.
        partition: how the LLM is cut into stages.
    """

    replicas: int
    size: int
    parallel: ParallelSizes
    sharding: ShardingOptions
    tokens: float = 1.0
    checkpointing: bool = False
    partition: str = "even"

    def __str__(self) -> str:
        sizes = {"dp": self.replicas, "pp": self.size, "tp": self.parallel.tensor, "cp": self.parallel.context}
        sizes |= {"ep": self.parallel.expert} if self.parallel.expert > 1 else {}
        return " ".join(f"{name}{size}" for name, size in sizes.items())


@dataclass(frozen=True)
class Space:
    """What may be chosen.

    Attributes:
        processes: number of all processes.
        experts: whether experts can be spread over tensor peers.
        tokens: tokens of a microbatch, relative to those of the config.
        checkpointing: whether the LLM's layers may save only their inputs, or must, or must not.
        shardings: what may lie in shards, those that send least first.
        partitions: how the LLM may be cut into stages.
        policies, backbones: names.
        pieces: largest numbers of pieces of policy filled.
    """

    processes: int
    experts: bool = False
    tokens: Sequence[float] = TIMES_OF_TOKENS
    checkpointing: Sequence[bool] = (False, True)
    shardings: Sequence[ShardingOptions] = SHARDINGS
    partitions: Sequence[str] = ("even", "auto")
    policies: Sequence[str] = tuple(POLICIES)
    backbones: Sequence[str] = tuple(BACKBONES)
    pieces: Sequence[int] = PIECES

    def meshes(self) -> Iterator[tuple[int, int, ParallelSizes]]:
        """Numbers of pipelines and of their ranks, and the processes of a rank."""
        total = self.processes
        for size in _divisors(total):
            for tensor in _divisors(total // size):
                for context in _divisors(total // size // tensor):
                    replicas = total // (size * tensor * context)
                    for expert in {1, tensor} if self.experts else {1}:
                        yield replicas, size, ParallelSizes(tensor, context, expert)

    def layouts(self) -> Iterator[Layout]:
        """All layouts, those that send least first within each mesh."""
        choices = (self.tokens, self.checkpointing, self.partitions, self.shardings)
        for mesh, (tokens, again, partition, sharding) in product(self.meshes(), product(*choices)):
            if partition == "even" or mesh[1] > 1:
                yield Layout(*mesh, sharding, tokens, again, partition)

    def schedules(self, size: int) -> Iterator[ScheduleOptions]:
        """All schedules of pipelines of `size` ranks. A pipeline of one rank has no bubbles, and one schedule."""
        if size == 1:
            yield ScheduleOptions("nested")
            return
        for backbone, policy in product(self.backbones, self.policies):
            allowed = [number for number in BACKBONES[backbone].virtual_stages if number <= MOST_VIRTUAL_STAGES]
            spread = POLICIES[policy].spread and not POLICIES[policy].own_ranks
            groups = sorted({size, max(size // 2, 1), 2 * size}) if spread else [None]
            pieces = self.pieces if policy == "filled" else (1,)
            for stages, group, piece in product(allowed, groups, pieces):
                yield ScheduleOptions(policy, backbone, group, stages, pieces=piece)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
