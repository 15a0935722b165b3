"""Plans for the batches of a PipelineModule, made from their metadata alone: by the pipeline itself, or by a worker of
the DataLoader while the step before still runs.

Knows batches, costs and plans; knows no tensors' values, no modules and no process groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigmac_lightning.batch import Batch, PipelineLayout
from bigmac_lightning.partition import Partition
from bigmac_lightning.runtime.lowering import Instruction, Needs, lower
from bigmac_lightning.schedule.backbones import get_backbone
from bigmac_lightning.schedule.plan import Costs, Plan, even_groups
from bigmac_lightning.schedule.policies import make_plan
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

CACHED_PLANS = 256
DEFAULT_COSTS = Costs(F=1, B=2, EF=1, EB=2, G=3)


@dataclass(frozen=True)
class PipelineOptions:
    """How batches are planned.

    Attributes:
        policy, backbone: by name, as in a plan.
        group_size: microbatches per group; ``None``: as many as there are ranks.
        microbatches: how many a training batch must have; ``None``: any number.
        costs: relative durations the planner assumes for the mean microbatch of a batch; F, B, I and W are those of all
            the stages of a rank together.
        virtual_stages: stages per rank.
        partition: how the LLM's layers are cut into stages.
    """

    policy: str = "nested"
    backbone: str = "1f1b"
    group_size: int | None = None
    microbatches: int | None = None
    costs: Costs = DEFAULT_COSTS
    virtual_stages: int = 1
    partition: Partition = "even"

    def stage_rank(self, size: int) -> list[int]:
        """The pipeline rank of each stage."""
        return get_backbone(self.backbone).stage_rank(size, self.virtual_stages)

    def layout(self, size: int, rank: int) -> PipelineLayout:
        """What the DataModule of pipeline rank `rank` of `size` has to know."""
        alone = self.policy == "first_stage"
        stage_rank = self.stage_rank(size)
        return PipelineLayout(
            size=size,
            rank=rank,
            group_size=1 if alone else self.group_size or size,
            microbatches=self.microbatches,
            encoder_ranks=(stage_rank[0],) if alone else None,
            generator_ranks=(stage_rank[-1],) if alone else None,
        )


@dataclass(frozen=True)
class Trained:
    """What is trained, as far as it changes what a plan has to do.

    Attributes:
        needs: where gradients flow.
        weights: per stage, whether it has trained weights; where not, a backward gives input gradients only.
        encoder_backward: the share of a whole encoder backward that is needed: below 1 if its lower part is frozen.
    """

    needs: Needs
    weights: tuple[bool, ...]
    encoder_backward: float = 1.0

    @classmethod
    def nothing(cls, stages: int) -> "Trained":
        return cls(Needs.nothing(stages), (False,) * stages)

    def costs(self, costs: Costs, encoder: bool, generator: bool) -> tuple[Costs, list[list[float]] | None]:
        """The costs of what is to be done, and those of each stage where stages differ."""
        trained = self.needs.stages[-1]
        costs = replace(
            costs,
            B=costs.B if trained else 0,
            I=costs.I if trained else 0,
            W=costs.W if trained else 0,
            EF=costs.EF if encoder else 0,
            EB=costs.EB * self.encoder_backward if encoder and self.needs.encoder else 0,
            G=costs.G if generator else 0,
        )
        if not trained or all(self.weights):
            return costs, None
        through = costs.B * costs.I / (costs.I + costs.W) if costs.I + costs.W else costs.B
        rows = [
            [costs.F, costs.B, costs.I, costs.W]
            if weights
            else [costs.F, through, costs.I, 0.0]
            if passed
            else [costs.F, 0.0, 0.0, 0.0]
            for weights, passed in zip(self.weights, self.needs.stages, strict=True)
        ]
        return costs, rows


@dataclass(frozen=True)
class PlannedBatch:
    """A plan, and what one rank has to do for it.

    Attributes:
        key: the metadata it was made from; batches with the same key have the same plan.
        plan: of all ranks.
        program: of this rank.
    """

    key: object
    plan: Plan
    program: list[Instruction]


class Planner:
    """Plans batches for one rank; remembers the plans of the last `CACHED_PLANS` keys.

    All ranks see the same metadata and make the same plan.

    Attributes:
        known: what it remembers, by key.
    """

    def __init__(self, options: PipelineOptions, size: int, rank: int, trained: Trained) -> None:
        self.options, self.size, self.rank, self.trained = options, size, rank, trained
        self.layout = options.layout(size, rank)
        self.known: dict[object, PlannedBatch] = {}

    def key(self, batch: Batch) -> object:
        """What the plan of a batch depends on."""
        return self.trained, tuple(
            (
                microbatch.inputs["input_ids"].numel(),
                tuple((item.owner, item.cost) for item in microbatch.media),
                tuple((item.owner, item.cost) for item in microbatch.targets),
            )
            for microbatch in batch.microbatches
        )

    def __call__(self, batch: Batch) -> PlannedBatch:
        """The plan of a batch whose microbatches are all useful."""
        key = self.key(batch)
        if key not in self.known:
            if len(self.known) >= CACHED_PLANS:
                self.known.pop(next(iter(self.known)))
            plan, work = self._plan(batch)
            order = simulate(plan, work).order  # make_plan has verified it
            self.known[key] = PlannedBatch(key, plan, lower(plan, order, self.trained.needs)[self.rank])
        return self.known[key]

    def _plan(self, batch: Batch) -> tuple[Plan, Workload]:
        groups = even_groups(len(batch), self.layout.group_size)
        media = [[(item.owner, item.cost) for item in m.media] for m in batch.microbatches]
        targets = [[(item.owner, item.cost) for item in m.targets] for m in batch.microbatches]
        encoder, generator = self._shares(media, groups), self._shares(targets, groups)
        costs, stage_costs = self.trained.costs(self._stage_costs(), _any(encoder), _any(generator))
        work = _workload(batch, costs)
        plan = make_plan(
            policy=self.options.policy,
            backbone=self.options.backbone,
            pipeline_parallel_size=self.size,
            virtual_stages=self.options.virtual_stages,
            microbatches=len(batch),
            group_size=self.layout.group_size,
            costs=costs,
            stage_costs=stage_costs,
            encoder_shares=encoder if _any(encoder) else None,
            generator_shares=generator if _any(generator) else None,
            workload=work,
        )
        return plan, work

    def _stage_costs(self) -> Costs:
        """The options' costs, for one of the rank's stages."""
        costs, stages = self.options.costs, self.options.virtual_stages
        return replace(costs, F=costs.F / stages, B=costs.B / stages, I=costs.I / stages, W=costs.W / stages)

    def _shares(self, items: list[list[tuple[int, float]]], groups: list[list[int]]) -> list[list[float]]:
        """Each rank's fraction of each group's cost."""
        rows: list[list[float]] = []
        for group in groups:
            row = [0.0] * self.size
            for m in group:
                for owner, cost in items[m]:
                    row[owner] += cost
            total = sum(row)
            rows.append([cost / total for cost in row] if total else row)
        return rows


class PlanningCollate:
    """A DataLoader's collate function that also plans the batch, in the process that it runs in.

    A batch that cannot be planned is passed on as it is: the pipeline says what is wrong with it.
    """

    def __init__(self, collate: Callable[[Any], Any], planner: Planner) -> None:
        self.collate, self.planner = collate, planner

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if isinstance(batch, Batch) and batch.layout == self.planner.layout:
            useful = batch.useful()
            if useful.microbatches and useful.is_owned():
                batch.planned = self.planner(useful)
        return batch


def _workload(batch: Batch, costs: Costs) -> Workload:
    """Durations of a batch whose mean microbatch takes `costs`."""
    tokens = [float(m.inputs["input_ids"].numel()) for m in batch.microbatches]
    mean = sum(tokens) / len(tokens)
    encoder = _scaled([[item.cost for item in m.media] for m in batch.microbatches], costs.EF)
    generator = _scaled([[item.cost for item in m.targets] for m in batch.microbatches], costs.G)
    parts = zip(tokens, encoder, generator, strict=True)
    return Workload(tuple(MicrobatchWork(llm / mean, media, targets) for llm, media, targets in parts))


def _scaled(items: Sequence[Sequence[float]], cost: float) -> list[tuple[float, ...]]:
    """Item costs as times, so that the mean microbatch takes `cost`."""
    total = sum(map(sum, items))
    factor = cost * len(items) / total if total else 0.0
    return [tuple(item * factor for item in row) for row in items]


def _any(rows: list[list[float]]) -> bool:
    return any(share > 0 for row in rows for share in row)
