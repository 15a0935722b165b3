"""Plans for the batches of a PipelineModule, made from their metadata alone: by the pipeline itself, or by a worker of
the DataLoader while the step before still runs.

Knows batches, costs and plans; knows no tensors' values, no modules and no process groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigmac_lightning.batch import Batch
from bigmac_lightning.options import PipelineOptions
from bigmac_lightning.runtime.lowering import Instruction, Needs, lower
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.policies import make_plan
from bigmac_lightning.schedule.simulate import simulate
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

CACHED_PLANS = 16
"""Batches of one shape share a plan, and so do a step's few shapes; uneven batches never meet theirs again."""


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
    """Plans batches for one rank; remembers the `CACHED_PLANS` plans that were used last.

    All ranks see the same metadata and make the same plan.

    Attributes:
        known: what it remembers, by key; used last, stands last.
    """

    def __init__(self, options: PipelineOptions, size: int, rank: int, trained: Trained) -> None:
        self.options, self.size, self.rank, self.trained = options, size, rank, trained
        self.layout = options.layout(size, rank)
        self.known: dict[object, PlannedBatch] = {}

    def key(self, batch: Batch) -> object:
        """What the plan of a batch depends on."""
        return self.trained, tuple(
            (
                microbatch.cost,
                tuple((item.owner, item.cost) for item in microbatch.media),
                tuple((item.owner, item.cost) for item in microbatch.targets),
            )
            for microbatch in batch.microbatches
        )

    def __call__(self, batch: Batch) -> PlannedBatch:
        """The plan of a batch whose microbatches are all useful."""
        key = self.key(batch)
        planned = self.known.pop(key, None)
        if planned is None:
            if len(self.known) >= CACHED_PLANS:
                self.known.pop(next(iter(self.known)))
            plan, work = self._plan(batch)
            order = simulate(plan, work).order  # make_plan has verified it
            planned = PlannedBatch(key, plan, lower(plan, order, self.trained.needs)[self.rank])
        self.known[key] = planned
        return planned

    def _plan(self, batch: Batch) -> tuple[Plan, Workload]:
        groups = self.layout.groups(len(batch))
        media = [[(item.owner, item.cost) for item in m.media] for m in batch.microbatches]
        targets = [[(item.owner, item.cost) for item in m.targets] for m in batch.microbatches]
        encoder, generator = self._shares(media, groups), self._shares(targets, groups)
        costs, stage_costs = self.trained.costs(
            self.options.costs.per_stage(self.options.stages_per_rank), _any(encoder), _any(generator)
        )
        if self.options.stage_factors:
            assert self.options.stage_factors != "auto", "not estimated yet"
            rows = stage_costs or [[costs.F, costs.B, costs.I, costs.W]] * len(self.options.stage_factors)
            pairs = zip(rows, self.options.stage_factors, strict=True)
            stage_costs = [[time * factor for time in row] for row, factor in pairs]
        work = _workload(batch, costs)
        plan = make_plan(
            policy=self.options.policy,
            backbone=self.options.backbone,
            pipeline_parallel_size=self.size,
            virtual_stages=self.options.stages_per_rank,
            microbatches=len(batch),
            groups=groups,
            pieces=self._pieces(media, groups),
            costs=costs,
            stage_costs=stage_costs,
            stage_rank=self.options.own_stage_rank,
            encoder_shares=encoder if _any(encoder) else None,
            generator_shares=generator if _any(generator) else None,
            workload=work,
            max_encoder_units=self.options.max_encoder_units,
            max_llm_microbatches=self.options.max_llm_microbatches,
            memory=self.options.memory,
        )
        return plan, work

    def _pieces(self, items: list[list[tuple[int, float]]], groups: list[list[int]]) -> list[list[int]]:
        """In how many pieces each rank's share of each group may be cut: no more than it has items."""
        return [
            [
                min(self.options.pieces, sum(owner == rank for m in group for owner, _ in items[m]))
                for rank in range(self.size)
            ]
            for group in groups
        ]

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
    costs_of_llm = [microbatch.cost for microbatch in batch.microbatches]
    mean = sum(costs_of_llm) / len(costs_of_llm)
    encoder = _scaled([[item.cost for item in m.media] for m in batch.microbatches], costs.EF)
    generator = _scaled([[item.cost for item in m.targets] for m in batch.microbatches], costs.G)
    parts = zip(costs_of_llm, encoder, generator, strict=True)
    return Workload(tuple(MicrobatchWork(llm / mean, media, targets) for llm, media, targets in parts))


def _scaled(items: Sequence[Sequence[float]], cost: float) -> list[tuple[float, ...]]:
    """Item costs as times, so that the mean microbatch takes `cost`."""
    total = sum(map(sum, items))
    factor = cost * len(items) / total if total else 0.0
    return [tuple(item * factor for item in row) for row in items]


def _any(rows: list[list[float]]) -> bool:
    return any(share > 0 for row in rows for share in row)
