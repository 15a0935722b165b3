"""What a plan is asked for: the options that users set, and what a batch and a model add to them."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.placing.policies import POLICIES, get_policy
from bigmac_lightning.schedule.workload import Workload

Auto = Literal["auto"]


@dataclass(frozen=True)
class ScheduleOptions:
    """How plans are made: the same options for training, for `bigmac plan` and for `bigmac compare`.

    Attributes:
        policy: How encoder and generator work is placed. nested: in the pauses of a consistent cut of the backbone;
            filled: as nested, then moved into bubbles; upfront: all encoder forwards first; recompute: as upfront, but
            encoder forwards keep nothing and run again before their backwards; first_stage: encoder and generator in
            the first and the last stage; disaggregated: on ranks of their own, as many as take the least time.
        backbone: The LLM-only schedule: gpipe, 1f1b, interleaved_1f1b, looped_bfs, zb1p, zbv, dualpipev, or a .csv or
            .json file. auto: the fastest one within the limits.
        group_size: Microbatches per group of encoder and generator work; by default the number of ranks that share
            this work, which is the number of all ranks except under disaggregated; first_stage always takes 1. auto:
            the number of ranks, half or twice of it, whichever is the fastest.
        virtual_stages: Stages per rank; by default as few as the backbone allows. auto, and the default if the
            backbone is auto: the fastest number.
        ramp: Make the first and the last groups smaller (1, 1, 2, 4, ..), because the pipeline waits for them.
        pieces: In how many pieces filled may cut a rank's encoder work of a group, so that it fits into smaller
            bubbles. In training, a piece is at least one media item.
        extra_in_flight: Microbatches in flight beyond those of the backbone. By default as many as a group has if
            there is a generator whose work is spread (more where the backbone needs it, twice as many under
            disaggregated), and none otherwise.
        costs: Relative times of the actions on a mean microbatch; F, B, I and W are those of all the stages of a rank
            together. By default 1 for F, 2 for B, 1 for I, W and EF, 2 for EB; in training also 3 for G.
        max_encoder_units: Most encoder units that a rank may have alive (a unit: the encoder's activations of one
            mean microbatch). filled uses what is allowed, by default 2, or 3 with a generator, or what nested takes
            if that is more. Plans of other policies that take more are refused.
        max_llm_microbatches: Most LLM microbatches that a rank may have in flight; other plans are refused.
        memory: Bytes, such as 16GiB, of an encoder unit, of an LLM microbatch and of what is always there, and the
            budget of a rank: filled has as many encoder units alive as fit, and plans above the budget are refused.

    Raises:
        ValueError: names the option, its value and what is expected.
    """

    policy: str = "nested"
    backbone: str = "1f1b"
    group_size: int | Auto | None = None
    virtual_stages: int | Auto | None = None
    ramp: bool = False
    pieces: int = 1
    extra_in_flight: int | None = None
    costs: Costs | None = None
    max_encoder_units: float | None = None
    max_llm_microbatches: float | None = None
    memory: MemoryBudget | None = None

    def __post_init__(self) -> None:
        get_policy(self.policy)
        for name, least in (("virtual_stages", 1), ("group_size", 1), ("pieces", 1), ("extra_in_flight", 0)):
            value, may_be_auto = getattr(self, name), name in ("virtual_stages", "group_size")
            if value is None or (value == "auto" and may_be_auto):
                continue
            if not isinstance(value, int) or value < least:
                auto = ', or "auto"' if may_be_auto else ""
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}{auto}")
        if self.backbone != "auto" and self.virtual_stages != "auto":
            get_backbone(self.backbone).check_virtual_stages(self.stages_per_rank)

    @property
    def has_auto(self) -> bool:
        """Whether some option is "auto", so that plans have to be compared first; see ``choose``."""
        return "auto" in (self.backbone, self.virtual_stages, self.group_size)

    @property
    def stages_per_rank(self) -> int:
        """The virtual stages, V; neither they nor the backbone may be "auto" any more."""
        if self.virtual_stages == "auto" or self.backbone == "auto":
            raise ValueError("virtual_stages or backbone is auto; choose a plan first")
        return self.virtual_stages or get_backbone(self.backbone).virtual_stages[0]

    @property
    def own_ranks(self) -> bool:
        """Whether encoder and generator work has ranks of its own."""
        return POLICIES[self.policy].own_ranks

    def request(self, pipeline_parallel_size: int, microbatches: int, **further: Any) -> "PlanRequest":
        """A request for a plan by these options; `further` are fields of ``PlanRequest``."""
        options: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(ScheduleOptions)}
        options |= {"pipeline_parallel_size": pipeline_parallel_size, "microbatches": microbatches}
        return PlanRequest(**options | further)


@dataclass(frozen=True)
class PlanRequest(ScheduleOptions):
    """All that a plan is made from.

    Attributes:
        pipeline_parallel_size: number of ranks, P.
        microbatches: number of microbatches, M.
        workload: the work of each microbatch, where they differ.
        groups: the microbatches of each group, if they are not as `group_size` and `ramp` make them.
        group_pieces: per group and rank, the most pieces of its encoder share; by default `pieces` for all.
        encoder_shares: per group, each rank's fraction of its encoder work, a row of zeros for a group without any;
            by default the same for all ranks that may have some (for first_stage: the rank of stage 0; for filled,
            where stages differ: whatever is fastest).
        generator_shares: the same for the generator (first_stage: the rank of the last stage).
        stage_costs: per stage, its times of F, B, I and W, where stages differ; see ``Plan.stage_costs``.
        stage_rank: for disaggregated, the rank of each stage; ranks before them are the encoder's, ranks after them
            the generator's. By default the numbers of ranks that take the least time. `costs` and `stage_costs` are
            those of stages on all ranks; fewer stages take longer by as much.
        layers: of the LLM; more stages than that, or several per rank that differ in size, are not chosen for "auto".
    """

    _: KW_ONLY
    pipeline_parallel_size: int
    microbatches: int
    workload: Workload | None = None
    groups: Sequence[Sequence[int]] | None = None
    group_pieces: Sequence[Sequence[int]] | None = None
    encoder_shares: Sequence[Sequence[float]] | None = None
    generator_shares: Sequence[Sequence[float]] | None = None
    stage_costs: Sequence[Sequence[float]] | None = None
    stage_rank: Sequence[int] | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("pipeline_parallel_size", "microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected an integer of at least 1")
        super().__post_init__()
        if self.stage_rank is not None and not self.own_ranks:
            raise ValueError(f"stage_rank is given; expected only with policy disaggregated, not with {self.policy}")
        given = self.stage_costs or self.encoder_shares or self.generator_shares
        if self.stage_rank is None and self.own_ranks and given:
            raise ValueError(
                f"stage_rank is missing; policy {self.policy} expects it beside given shares or stage_costs"
            )

    @property
    def action_costs(self) -> Costs:
        """Times of the actions, where F, B, I and W are those of one stage."""
        return (self.costs or Costs()).per_stage(self.stages_per_rank)
