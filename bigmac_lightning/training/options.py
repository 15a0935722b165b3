"""What a user may say about how batches are planned, and what follows from it for ranks and data.

Knows names, numbers and plans; knows no batches, tensors or process groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.estimates.partition import LayerCosts, Partition
from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.choose import Auto, Case, choose
from bigmac_lightning.schedule.make import POLICIES, make_plan
from bigmac_lightning.schedule.placing.uneven_shares import pour
from bigmac_lightning.schedule.plan import Costs

DEFAULT_COSTS = Costs(F=1, B=2, EF=1, EB=2, G=3)


@dataclass(frozen=True)
class PipelineOptions:
    """How batches are planned.

    Attributes:
        policy, backbone: by name, as in a plan.
        group_size: microbatches per group; ``None``: as many as there are ranks that share their work.
        microbatches: how many a training batch must have; ``None``: any number.
        costs: relative durations the planner assumes for the mean microbatch of a batch; F, B, I and W are those of all
            the stages of a rank together.
        virtual_stages: stages per rank; ``None``: as few as the backbone allows.
        partition: how the LLM's layers are cut into stages.
        max_encoder_units, max_llm_microbatches, memory: the caps of every plan; see ``make_plan``.
        ramp: whether the first and the last groups are smaller than `group_size`; see ``ramp_groups``.
        pieces: in how many pieces `filled` may cut an encoder share.
        stage_factors: for each stage, how many times as long as `costs` say it takes; ``None``: 1 for all; "auto":
            estimated from its layers by `estimated`.
        sample_tokens: of a typical sample, by which attention's part of the layers' costs is estimated; 0: left out.
        own_stage_rank: the rank of each stage, where the policy leaves it open; set by `chosen`.

    `backbone`, `group_size` and `virtual_stages` may be "auto" until `chosen` has named them.

    Raises:
        ValueError: for an unknown policy or backbone, or virtual stages that the backbone does not allow.
    """

    policy: str = "nested"
    backbone: str = "1f1b"
    group_size: int | Auto | None = None
    microbatches: int | None = None
    costs: Costs = DEFAULT_COSTS
    virtual_stages: int | Auto | None = None
    partition: Partition = "even"
    max_encoder_units: float | None = None
    max_llm_microbatches: float | None = None
    memory: MemoryBudget | None = None
    ramp: bool = False
    pieces: int = 1
    stage_factors: tuple[float, ...] | Auto | None = None
    sample_tokens: int = 0
    own_stage_rank: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            known = ", ".join(sorted(POLICIES))
            raise ValueError(f"policy={self.policy!r} is not known; choose one of {known}")
        allowed = None if self.backbone == "auto" else get_backbone(self.backbone).virtual_stages
        if allowed is not None and self.virtual_stages != "auto" and self.stages_per_rank not in allowed:
            raise ValueError(
                f"virtual_stages={self.stages_per_rank} does not go with backbone={self.backbone!r}: it allows "
                f"{', '.join(map(str, allowed)) if len(allowed) < 10 else f'{allowed[0]} to {allowed[-1]}'}"
            )

    def chosen(self, size: int, layers: int, encoder: bool, generator: bool) -> "tuple[PipelineOptions, str]":
        """These options with whatever is open named, and why: what is "auto", and the rank of each stage where the
        policy leaves it open. The same on all ranks, and for all batches.

        Plans are compared for as many microbatches as a batch must have, or else 4 P, of equal work, with everything
        trained.

        Args:
            size: ranks of the pipeline, P.
            layers: of the LLM.
            encoder, generator: whether the model has any.

        Raises:
            ValueError: if nothing fits, with the reason of each candidate.
        """
        costs = self.costs.occurring(EF=encoder, G=generator)
        if self.stage_factors is not None and POLICIES[self.policy].own_ranks:
            raise ValueError(f"stage_factors={self.stage_factors} does not go with policy={self.policy!r}")
        named, reason = self, ""
        if "auto" in (self.backbone, self.group_size, self.virtual_stages):
            caps = (self.max_encoder_units, self.max_llm_microbatches, self.memory)
            case = Case(size, self.microbatches or 4 * size, costs, None, *caps, layers)
            choice = choose(case, self.policy, self.backbone, self.virtual_stages, self.group_size)
            best, reason = choice.best, choice.reason
            named = replace(
                self, backbone=best.backbone, virtual_stages=best.virtual_stages, group_size=best.group_size
            )
        if POLICIES[self.policy].own_ranks:
            assert named.group_size != "auto"
            plan = make_plan(
                policy=self.policy,
                backbone=named.backbone,
                pipeline_parallel_size=size,
                virtual_stages=named.stages_per_rank,
                microbatches=self.microbatches or 4 * size,
                group_size=named.group_size,
                costs=costs.per_stage(named.stages_per_rank),
            )
            named = replace(named, own_stage_rank=tuple(plan.stage_rank))
        stages = len(named.stage_rank(size))
        if self.stage_factors not in (None, "auto") and len(self.stage_factors) != stages:
            raise ValueError(f"stage_factors={self.stage_factors} must have one number for each of {stages} stages")
        return named, reason

    def estimated(self, costs: LayerCosts, stages: Sequence[range]) -> "PipelineOptions":
        """With stage factors, if they are "auto", from the layers' estimated costs."""
        if self.stage_factors != "auto":
            return self
        times = [costs.of(stage) for stage in stages]
        mean = sum(times) / len(times)
        return replace(self, stage_factors=tuple(time / mean for time in times))

    @property
    def stages_per_rank(self) -> int:
        """The virtual stages, once named."""
        assert self.virtual_stages != "auto", "not chosen yet"
        return self.virtual_stages or get_backbone(self.backbone).virtual_stages[0]

    def stage_rank(self, size: int) -> list[int]:
        """The pipeline rank of each stage."""
        if POLICIES[self.policy].own_ranks:
            assert self.own_stage_rank is not None, "not chosen yet"
            return list(self.own_stage_rank)
        return get_backbone(self.backbone).stage_rank(size, self.stages_per_rank)

    def layout(self, size: int, rank: int) -> PipelineLayout:
        """What the DataModule of pipeline rank `rank` of `size` has to know."""
        assert self.group_size != "auto", "not chosen yet"
        policy, stage_rank = POLICIES[self.policy], self.stage_rank(size)
        return PipelineLayout(
            size=size,
            rank=rank,
            group_size=policy.group_size(self.group_size, stage_rank, size),
            microbatches=self.microbatches,
            encoder_ranks=_unless_all(policy.encoder_ranks(stage_rank, size), size),
            generator_ranks=_unless_all(policy.generator_ranks(stage_rank, size), size),
            ramp=self.ramp and policy.spread,
            weights=self._weights(stage_rank, size) if policy.pours and self.stage_factors else None,
        )

    def _weights(self, stage_rank: Sequence[int], size: int) -> tuple[float, ...]:
        """Each rank's fraction of encoder and generator work, so that all end together."""
        assert self.stage_factors is not None
        assert self.stage_factors != "auto", "not estimated yet"
        costs, busy = self.costs.per_stage(self.stages_per_rank), [0.0] * size
        for rank, factor in zip(stage_rank, self.stage_factors, strict=True):
            busy[rank] += factor * (costs.F + costs.B)
        return tuple(pour(busy, costs.EF + costs.EB + costs.G))


def _unless_all(ranks: Sequence[int], size: int) -> tuple[int, ...] | None:
    return None if len(ranks) == size else tuple(ranks)
