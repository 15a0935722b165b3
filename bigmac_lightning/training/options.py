"""What a user may say about how a model is cut into stages and how its batches are planned, and what follows from it
for ranks and data."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.estimates.partition import LayerCosts, Partition
from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.choose import choose
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.measured_costs import MeasuredCosts
from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.placing.uneven_shares import balanced_shares
from bigmac_lightning.schedule.request import Auto, ScheduleOptions

DEFAULT_COSTS = Costs(F=1, B=2, EF=1, EB=2, G=3)
"""A backward takes about twice its forward, and a generator's action is a forward and a backward. That encoder,
generator and a rank's part of the LLM take equally long is a guess until costs are given or measured."""

SPLIT = (
    "splits backwards into I and W, between which the weights of a block would have to stay: use 1f1b, gpipe, "
    "interleaved_1f1b or looped_bfs, or set sharding.stages to zero1"
)

MANY_MICROBATCHES = 8
"""By default, gradients of more microbatches than this are summed in float32: each addition in bfloat16 rounds."""

MICROBATCHES_PER_RANK = 4
""""auto" compares plans of so many microbatches per rank, where their number is not given: with fewer the bubbles at
both ends would decide, more would only take longer to plan."""


@dataclass(frozen=True)
class StageOptions:
    """How the LLM is cut into stages.

    Attributes:
        partition: How the LLM's layers are cut into stages. even: nearly equal numbers; auto: balanced by estimated
            cost, with the head and what is frozen counted; or the number of layers of each stage.
        factors: For each stage, how many times as long as the schedule's costs say it takes (the last one has the
            head), or auto, estimated from its layers: filled then gives slow ranks less encoder and generator work.
        sample_tokens: Tokens of a typical sample, by which attention's part of a layer's cost is estimated for auto;
            0: it is left out.

    Raises:
        ValueError: names the option, its value and what is expected.
    """

    partition: Literal["even", "auto"] | list[int] = "even"
    factors: list[float] | Auto | None = None
    sample_tokens: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.partition, str) and self.partition not in ("even", "auto"):
            raise ValueError(f'partition is {self.partition!r}; expected "even", "auto" or a list of numbers of layers')
        if isinstance(self.factors, str) and self.factors != "auto":
            raise ValueError(f'factors is {self.factors!r}; expected "auto" or a list with a number for each stage')
        if self.sample_tokens < 0:
            raise ValueError(f"sample_tokens is {self.sample_tokens}; expected at least 0")


SHARDINGS = ("ddp", "zero1", "fsdp")
OPTION_OF = {"encoders": "encoders", "generators": "generators", "llm": "stages"}
"""The field of `ShardingOptions` that says how each kind of component is sharded."""


@dataclass(frozen=True)
class ShardingOptions:
    """Which weights, gradients and optimizer states lie in shards on several ranks, instead of whole on each.

    ddp: everything is whole on each rank that has the component. zero1: a rank has whole weights and gradients during a
    batch only; between batches, and in the optimizer, it has its shard. fsdp: moreover, whole weights of a block of
    layers exist only while the block runs, and its gradients are summed into the shards at once.

    Attributes:
        encoders: For encoders: ddp; zero1, over all ranks; or fsdp, over the ranks of each pipeline.
        generators: For generators, likewise.
        stages: For the stages of the LLM: ddp; or zero1 or fsdp, over the pipelines (and context peers). Embedding and
            output layer are always gathered for a whole batch. fsdp needs the same number of microbatches in each
            pipeline, and plans take all microbatches and items as equal.
        master_weights: With precision bf16-true or 16-true: shards of weights, their gradients and the optimizer's
            states are float32, and the whole weights, with which the model computes, are 16-bit. Every component that
            is trained must then be zero1 or fsdp, which it may be on a single rank, too.
        offload: Which of encoders, generators and stages have their shards, the gradients of these and the optimizer's
            states in the CPU's memory, where the optimizer steps. Whole weights and their gradients are on the device
            while they are gathered. What is offloaded must be zero1 or fsdp, which it may be on a single rank, too.

    Raises:
        ValueError: names the option, its value and what is expected.
    """

    encoders: Literal["ddp", "zero1", "fsdp"] = "ddp"
    generators: Literal["ddp", "zero1", "fsdp"] = "ddp"
    stages: Literal["ddp", "zero1", "fsdp"] = "ddp"
    master_weights: bool = False
    offload: tuple[Literal["encoders", "generators", "stages"], ...] = ()

    def __post_init__(self) -> None:
        names = tuple(OPTION_OF.values())
        for name in names:
            if getattr(self, name) not in SHARDINGS:
                raise ValueError(f"sharding.{name} is {getattr(self, name)!r}; expected one of {', '.join(SHARDINGS)}")
        if isinstance(self.offload, str) or not set(self.offload) <= set(names):
            raise ValueError(f"sharding.offload is {self.offload!r}; expected a list of some of {', '.join(names)}")
        for name in self.offload:
            if getattr(self, name) == "ddp":
                raise ValueError(
                    f"sharding.offload names {name}, but sharding.{name} is ddp, and only shards can be offloaded: set "
                    f"sharding.{name} to zero1 or fsdp, or take {name} out of offload"
                )
        if self.master_weights and (self.encoders, self.generators, self.stages) == ("ddp", "ddp", "ddp"):
            raise ValueError(
                "sharding.master_weights needs shards, which nothing has: set encoders, generators and stages to zero1 "
                "or fsdp, as far as they are trained"
            )

    def of_component(self, name: str) -> str:
        """How a component, such as "encoders.image" or "llm", is sharded, or the one that a parameter belongs to."""
        option = OPTION_OF.get(name.partition(".")[0])
        return "ddp" if option is None else getattr(self, option)

    def offloads(self, name: str) -> bool:
        """Whether the shards of a component, or of the one that a parameter belongs to, lie in the CPU's memory."""
        return OPTION_OF.get(name.partition(".")[0]) in self.offload

    @property
    def meeting(self) -> tuple[Kind, ...]:
        """The kinds of actions inside which all ranks of a pipeline meet in collectives."""
        encoders: tuple[Kind, ...] = ("EF", "EB") if self.encoders == "fsdp" else ()
        generators: tuple[Kind, ...] = ("G",) if self.generators == "fsdp" else ()
        return encoders + generators


@dataclass(frozen=True)
class PipelineOptions:
    """How batches are planned and the LLM is cut, for one run.

    Attributes:
        schedule: how plans are made. "auto"s stand in it until `resolved` has replaced them.
        microbatches: how many a training batch must have; ``None``: any number.
        partition: see ``StageOptions``.
        stage_factors: ``StageOptions.factors``; "auto" until `estimated` has replaced it.
        sample_tokens: see ``StageOptions``.
        own_stage_rank: the rank of each stage under a policy that leaves it open; set by `resolved`.
        sharding: which weights lie in shards.
        parallel: over how many processes the work of a stage is divided.
        known: the costs of the file that the schedule names; ``None``: it names none.
        assumed: what plans assume of costs that are not given, before anything is measured.

    Raises:
        ValueError: the schedule does not go with shards that all ranks gather together.
    """

    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    microbatches: int | None = None
    partition: Partition = "even"
    stage_factors: tuple[float, ...] | Auto | None = None
    sample_tokens: int = 0
    own_stage_rank: tuple[int, ...] | None = None
    sharding: ShardingOptions = ShardingOptions()
    parallel: ParallelSizes = field(default_factory=ParallelSizes)
    known: MeasuredCosts | None = None
    assumed: Costs = DEFAULT_COSTS

    def __post_init__(self) -> None:
        parallel = self.parallel
        if parallel.expert not in (1, parallel.tensor):
            raise ValueError(
                f"expert_parallel_size={parallel.expert} must be 1 or tensor_parallel_size={parallel.tensor}, as "
                "experts are spread over the tensor peers"
            )
        backbone = self.schedule.backbone
        if self.sharding.stages == "fsdp" and backbone != "auto" and get_backbone(backbone).splits:
            raise ValueError(f"sharding.stages is fsdp, but backbone {backbone} {SPLIT}")
        for kind, name in (("EF", "encoders"), ("G", "generators")):
            if kind not in self.sharding.meeting:
                continue
            if not POLICIES[self.schedule.policy].spread or self.schedule.own_ranks:
                raise ValueError(
                    f"sharding.{name} is fsdp, but under policy {self.schedule.policy} only some ranks run {name}, and "
                    "all ranks must gather their weights: use zero1 or ddp, or policy nested, filled, upfront or "
                    "recompute"
                )
            if kind == "EF" and self.schedule.pieces > 1:
                raise ValueError(
                    f"sharding.encoders is fsdp, so all ranks run encoders at the same time, and pieces="
                    f"{self.schedule.pieces} of different size are not possible: leave pieces out, or use zero1 or ddp"
                )

    @classmethod
    def of(
        cls,
        schedule: ScheduleOptions,
        stages: StageOptions,
        microbatches: int | None,
        sharding: ShardingOptions | None = None,
        parallel: ParallelSizes | None = None,
    ) -> "PipelineOptions":
        """The options as a user gives them."""
        partition, factors = stages.partition, stages.factors
        return cls(
            schedule,
            microbatches,
            tuple(partition) if isinstance(partition, list) else partition,
            tuple(factors) if isinstance(factors, list) else factors,
            stages.sample_tokens,
            sharding=sharding or ShardingOptions(),
            parallel=parallel or ParallelSizes(),
            known=None if schedule.costs_file is None else MeasuredCosts.load(schedule.costs_file),
        )

    @property
    def costs(self) -> Costs:
        """The costs that plans assume: the schedule's own, or those that are `assumed`."""
        return self.schedule.given_costs or self.assumed

    def resolved(self, size: int, layers: int, encoder: bool, generator: bool) -> "tuple[PipelineOptions, str]":
        """These options with everything named that was left open: what is "auto", and the rank of each stage under a
        policy that leaves it open. The same on all ranks, and for all batches.

        Plans are compared for as many microbatches as a batch must have, or else 4 P, of equal work, with everything
        trained.

        Args:
            size: number of the pipeline's ranks, P.
            layers: number of the LLM's layers.
            encoder, generator: whether the model has any.

        Returns: the options, and a text that says why "auto" became what it is; empty without "auto".

        Raises:
            ValueError: nothing fits, with the reason of each candidate.
        """
        if self.stage_factors is not None and self.schedule.own_ranks:
            raise ValueError(
                f"factors={self.stage_factors} of stages do not go with policy {self.schedule.policy}: leave them out"
            )
        costs = self.costs.occurring(EF=encoder, G=generator)
        microbatches = self.microbatches or MICROBATCHES_PER_RANK * size
        schedule, reason = self.schedule, ""
        if schedule.has_auto:
            estimated, meeting = replace(schedule, costs=costs), self.sharding.meeting
            choice = choose(estimated.request(size, microbatches, layers=layers, meeting=meeting))
            if self.sharding.stages == "fsdp":
                choice = choice.among(lambda plan: not get_backbone(plan.backbone).splits, SPLIT)
            best, reason = choice.best, choice.reason
            schedule = replace(
                schedule, backbone=best.backbone, virtual_stages=best.virtual_stages, group_size=best.group_size
            )
        options = replace(self, schedule=schedule)
        if schedule.own_ranks:
            unlimited = replace(schedule, costs=costs, max_encoder_units=None, max_llm_microbatches=None, memory=None)
            plan = make_plan(unlimited.request(size, microbatches))
            options = replace(options, own_stage_rank=tuple(plan.stage_rank))
        stages = len(options.stage_rank(size))
        if self.stage_factors not in (None, "auto") and len(self.stage_factors) != stages:
            raise ValueError(f"factors={list(self.stage_factors)} must have one number for each of {stages} stages")
        return options, reason

    def estimated(self, costs: LayerCosts, stages: Sequence[range]) -> "PipelineOptions":
        """With stage factors, if they are "auto", from the layers' estimated costs."""
        if self.stage_factors != "auto":
            return self
        times = [costs.of(stage) for stage in stages]
        mean = sum(times) / len(times)
        return replace(self, stage_factors=tuple(time / mean for time in times))

    def stage_rank(self, size: int) -> list[int]:
        """The pipeline rank of each stage."""
        if self.schedule.own_ranks:
            assert self.own_stage_rank is not None, "not resolved yet"
            return list(self.own_stage_rank)
        return get_backbone(self.schedule.backbone).stage_rank(size, self.schedule.stages_per_rank)

    def layout(self, size: int, rank: int, peer: int = 0) -> PipelineLayout:
        """What the DataModule of process `peer` of pipeline rank `rank` of `size` has to know."""
        schedule = self.schedule
        assert schedule.group_size != "auto", "not resolved yet"
        policy, stage_rank = POLICIES[schedule.policy], self.stage_rank(size)
        return PipelineLayout(
            size=size,
            rank=rank,
            group_size=policy.group_size(schedule.group_size, stage_rank, size),
            microbatches=self.microbatches,
            encoder_ranks=_unless_all(policy.encoder_ranks(stage_rank, size), size),
            generator_ranks=_unless_all(policy.generator_ranks(stage_rank, size), size),
            ramp=schedule.ramp and policy.spread,
            weights=self._weights(stage_rank, size) if policy.uneven_shares and self.stage_factors else None,
            peers=self.parallel.peers,
            peer=peer,
        )

    def _weights(self, stage_rank: Sequence[int], size: int) -> tuple[float, ...]:
        """Each rank's fraction of encoder and generator work, so that all end together."""
        assert self.stage_factors is not None
        assert self.stage_factors != "auto", "not estimated yet"
        costs, busy = self.costs.per_stage(self.schedule.stages_per_rank), [0.0] * size
        for rank, factor in zip(stage_rank, self.stage_factors, strict=True):
            busy[rank] += factor * (costs.F + costs.B)
        return tuple(balanced_shares(busy, costs.EF + costs.EB + costs.G))


def _unless_all(ranks: Sequence[int], size: int) -> tuple[int, ...] | None:
    return None if len(ranks) == size else tuple(ranks)
