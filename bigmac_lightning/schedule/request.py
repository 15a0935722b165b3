"""The request for a plan: the options that users set, and the further values that come from a batch and a model."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.measured_costs import SUFFIX
from bigmac_lightning.schedule.placing.policies import POLICIES, get_policy
from bigmac_lightning.schedule.workload import Workload

Auto = Literal["auto"]


@dataclass(frozen=True)
class ScheduleOptions:
    """The options that decide how plans are made. Training, `bigmac plan` and `bigmac compare` have the same ones.

    Attributes:
        policy: How encoder and generator work is placed. nested: in the pauses of consistent cuts of the backbone;
            filled: as nested, and then moved into bubbles; upfront: all encoder forwards first, all encoder backwards
            last; recompute: as upfront, but encoder forwards save no activations and run again before their backwards;
            first_stage: the encoder with the first stage, the generator with the last stage; disaggregated: on separate
            ranks, whose numbers are chosen so that the plan is the fastest.
        backbone: The LLM-only schedule: gpipe, 1f1b, interleaved_1f1b, looped_bfs, zb1p, zbv, dualpipev, or a .csv or
            .json file. auto: the fastest one within the limits.
        group_size: Microbatches per group of encoder and generator work. The default is the number of ranks that share
            this work (all ranks, except under disaggregated). first_stage always takes 1. auto: the number of ranks,
            half of it or twice of it, whichever gives the fastest plan.
        virtual_stages: Stages per rank. The default is the smallest number that the backbone allows. auto, which is the
            default if the backbone is auto: the fastest number.
        ramp: Make the first and the last groups smaller (1, 1, 2, 4, ..), because the ranks wait for these groups.
        pieces: Largest number of pieces that filled may cut a rank's encoder work of a group into, so that it fits into
            smaller bubbles. In training, a piece has at least one media item.
        extra_in_flight: Microbatches in flight in addition to those of the backbone. The default is 0 without a
            generator and under first_stage. Otherwise it is the size of the largest group (twice that under
            disaggregated), or more if the backbone needs more to make time for the generator.
        costs: Relative times of the actions on a mean microbatch; F, B, I and W are for all stages of a rank together.
            A .json file that `bigmac profile` has written: its measured times. auto, the default: a training measures
            them, and plans are made from the times of its own actions after the first batches. Until then it
            estimates them if it can. Otherwise, and elsewhere, they are 1 for F, I, W and EF, 2 for B and EB, and 0 for
            G (in training 3).
        max_encoder_units: Limit on the encoder units that are alive on a rank (a unit is the encoder's activations of
            one mean microbatch). filled uses as many as the limit allows; its default is 2, or 3 with a generator, or
            what nested takes if that is more. Plans of other policies that exceed the limit are refused.
        max_llm_microbatches: Limit on the LLM microbatches in flight on a rank. Plans that exceed it are refused.
        memory: Sizes, such as 16GiB, of an encoder unit, of an LLM microbatch, of the memory that is always in use, and
            of the budget of a rank. filled uses as many encoder units as fit; plans above the budget are refused.

    Raises:
        ValueError: an option has a wrong value; the message names the option, its value and the expected values.
    """

    policy: str = "nested"
    backbone: str = "1f1b"
    group_size: int | Auto | None = None
    virtual_stages: int | Auto | None = None
    ramp: bool = False
    pieces: int = 1
    extra_in_flight: int | None = None
    costs: Costs | str | None = None
    max_encoder_units: float | None = None
    max_llm_microbatches: float | None = None
    memory: MemoryBudget | None = None

    def __post_init__(self) -> None:
        get_policy(self.policy)
        if isinstance(self.costs, str) and self.costs != "auto" and not self.costs.endswith(SUFFIX):
            raise ValueError(f'costs is {self.costs!r}; expected times of the actions, a {SUFFIX} file, or "auto"')
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
        """Whether an option is "auto", so that ``choose`` must compare plans before one can be made."""
        return "auto" in (self.backbone, self.virtual_stages, self.group_size)

    @property
    def stages_per_rank(self) -> int:
        """The number of stages per rank, V.

        Raises:
            ValueError: `virtual_stages` or `backbone` is "auto".
        """
        if self.virtual_stages == "auto" or self.backbone == "auto":
            raise ValueError("virtual_stages or backbone is auto; choose a plan first")
        return self.virtual_stages or get_backbone(self.backbone).virtual_stages[0]

    @property
    def given_costs(self) -> Costs | None:
        """The costs; ``None`` if they are left open."""
        return self.costs if isinstance(self.costs, Costs) else None

    @property
    def costs_file(self) -> str | None:
        """The name of the file that has the costs; ``None`` if there is none."""
        return self.costs if isinstance(self.costs, str) and self.costs != "auto" else None

    @property
    def own_ranks(self) -> bool:
        """Whether the policy has separate ranks for encoder and generator work, which have no LLM stage."""
        return POLICIES[self.policy].own_ranks

    def request(self, pipeline_parallel_size: int, microbatches: int, **further: Any) -> "PlanRequest":
        """Return a request for a plan with these options; `further` are other fields of ``PlanRequest``."""
        options: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(ScheduleOptions)}
        options |= {"pipeline_parallel_size": pipeline_parallel_size, "microbatches": microbatches}
        return PlanRequest(**options | further)


@dataclass(frozen=True)
class PlanRequest(ScheduleOptions):
    """Everything that a plan is made from: the options, and the values that come from the run, a batch and a model.

    Attributes:
        pipeline_parallel_size: number of ranks, P.
        microbatches: number of microbatches, M.
        workload: the work of each microbatch, where microbatches differ.
        groups: microbatches of each group; by default `group_size` and `ramp` decide.
        group_pieces: per group and rank, the largest number of pieces of the rank's encoder share; by default `pieces`.
        encoder_shares: per group, each rank's fraction of the group's encoder work; a row of zeros for a group without
            encoder work. By default the work is spread evenly over all ranks that may have some (for first_stage only
            the rank of stage 0); if stages differ, filled tries uneven shares as well.
        generator_shares: per group, each rank's fraction of the group's generator work, with the same defaults (for
            first_stage only the rank of the last stage).
        stage_costs: per stage, its times of F, B, I and W, where stages differ; see ``Plan.stage_costs``.
        stage_rank: rank of each stage, for disaggregated only. Lower ranks are the encoder's, higher ranks are the
            generator's. The default is chosen so that the plan is the fastest. `costs` and `stage_costs` are for an LLM
            on all P ranks; on fewer ranks a stage takes proportionally longer.
        meeting: the kinds of actions inside which all ranks wait for each other; see ``Plan.meeting``.
        layers: number of layers of the LLM. For "auto", only as many stages as layers are chosen, and several stages
            per rank only if all stages have the same number of layers.

    Raises:
        ValueError: an option has a wrong value, or does not fit the policy.
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
    meeting: Sequence[Kind] = ()
    layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("pipeline_parallel_size", "microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected an integer of at least 1")
        super().__post_init__()
        if self.costs_file is not None:
            raise ValueError(f"costs is {self.costs_file!r}; expected times, as `MeasuredCosts.load` reads them")
        if self.stage_rank is not None and not self.own_ranks:
            raise ValueError(f"stage_rank is given; expected only with policy disaggregated, not with {self.policy}")
        given = self.stage_costs or self.encoder_shares or self.generator_shares
        if self.stage_rank is None and self.own_ranks and given:
            raise ValueError(
                f"stage_rank is missing; policy {self.policy} expects it beside given shares or stage_costs"
            )

    @property
    def action_costs(self) -> Costs:
        """Times of the actions, where F, B, I and W are for one stage (in `costs` they are for all stages of a
        rank)."""
        return (self.given_costs or Costs()).per_stage(self.stages_per_rank)
