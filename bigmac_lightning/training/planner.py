"""Plans batches from their metadata alone: in the training process, or in a worker of the DataLoader while the step
before still runs."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from bigmac_lightning.contracts.batch import Batch, MediaItem, TargetItem
from bigmac_lightning.runtime.lowering import Instruction, Needs, lower, with_hints
from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.collective_order import collective_order
from bigmac_lightning.schedule.costs import NEGLIGIBLE
from bigmac_lightning.schedule.liveness import generator_units
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.rates import Rates
from bigmac_lightning.schedule.simulate import Timeline, simulate
from bigmac_lightning.schedule.workload import Workload
from bigmac_lightning.training.batch_facts import fingerprint, plan_digest
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.trained import SharedTrained, Trained
from bigmac_lightning.training.work import OwnedCost, OwnedCosts, SharedRates, guessed, measured, of_equal_work

CACHED_PLANS = 16
"""How many plans are remembered: enough for the few shapes that even batches have. Uneven batches never repeat."""


@dataclass(frozen=True)
class PlannedBatch:
    """What one rank needs of the plan of a batch: its program, and how media and targets are divided.

    It travels from a DataLoader's worker to the training process at every step. The lists of all other ranks, which
    would take most of the time, travel as text, and are parsed only if `plan` is asked for.

    Attributes:
        key: the metadata that the plan was made from; batches with the same key have the same plan.
        program: this rank's instructions.
        needs: where gradients are needed.
        groups: the microbatches of each group.
        pieces: for EF and G, by group and rank, in how many pieces the rank's share is cut.
        recomputes: whether encoder forwards keep nothing, and run again before their backwards.
        source: the plan, or its text.
        digest: a number that depends on the whole plan.
        seconds: how long the whole plan takes by what was measured; ``None``: nothing was yet.
        bubbles: the fraction of that time, or of what costs say, in which the mean rank is idle.
        workload: the work of the microbatches that the plan was made for, in the unit of the plan's costs.
        alive: the encoder units, the LLM microbatches and the microbatches' worth of targets whose activations this
            rank holds at its peak.
    """

    key: object
    program: list[Instruction]
    needs: Needs
    groups: list[list[int]]
    pieces: dict[str, dict[tuple[int, int], int]]
    recomputes: bool
    source: Plan | str
    digest: int
    seconds: float | None
    bubbles: float
    workload: Workload
    alive: tuple[float, float, float]

    @classmethod
    def of(
        cls,
        key: object,
        plan: Plan,
        program: list[Instruction],
        needs: Needs,
        timeline: Timeline,
        measured: bool,
        workload: Workload,
        rank: int,
    ) -> "PlannedBatch":
        """What one rank needs of a plan.

        Args:
            timeline: the plan's simulation.
            measured: whether it is in seconds.
            workload: the workload that it was simulated with.
        """
        pieces, digest = {kind: plan.pieces(kind) for kind in ("EF", "G")}, plan_digest(plan)
        times = (timeline.makespan if measured else None, timeline.bubble_share, workload)
        alive = (timeline.encoder_units[rank], timeline.llm_microbatches[rank], generator_units(plan, rank))
        return cls(key, program, needs, plan.groups, pieces, plan.recomputes, plan, digest, *times, alive)

    @cached_property
    def plan(self) -> Plan:
        """The plan of all ranks."""
        return Plan.from_json(self.source) if isinstance(self.source, str) else self.source

    def __getstate__(self) -> dict[str, Any]:
        state = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return state if isinstance(self.source, str) else state | {"source": self.source.to_json()}


class Planner:
    """Plans batches for one rank, and remembers the `CACHED_PLANS` plans that were used last.

    All ranks see the same metadata and make the same plan. Copies of a planner in workers share `trained`.

    Attributes:
        known: the remembered plans by key, the least recently used first.
    """

    def __init__(
        self,
        options: PipelineOptions,
        size: int,
        rank: int,
        trained: Trained,
        encoders: Iterable[str] = (),
        alike: Collection[str] | None = None,
    ) -> None:
        """
        Args:
            options: options without any "auto".
            size, rank: number of the pipeline's ranks, and which of them this is.
            trained: what is trained now.
            encoders: names of encoders that may be trained later.
            alike: if given, all pipelines must run the LLM's actions in the same order, whatever their batches are. So
                plans are made for microbatches that are all alike, with the kinds of action (EF, G) named here.
        """
        self.alike = alike
        self.options, self.size, self.rank = options, size, rank
        self.layout = options.layout(size, rank)
        self.known: dict[object, PlannedBatch] = {}
        self._trained = SharedTrained({*encoders, *trained.encoders}, trained)
        self._rates = SharedRates(len(trained.weights))

    @property
    def trained(self) -> Trained:
        """What is trained now."""
        return self._trained.get()

    @trained.setter
    def trained(self, trained: Trained) -> None:
        self._trained.set(trained)

    @property
    def rates(self) -> Rates | None:
        """How long actions take, as far as it was measured."""
        return self._rates.get()

    @rates.setter
    def rates(self, rates: Rates | None) -> None:
        self._rates.set(rates)

    def key(self, batch: Batch) -> object:
        """Everything that the plan of a batch depends on, were it made now."""
        return self._key(batch, self.trained, self.rates)

    def _key(self, batch: Batch, trained: Trained, rates: Rates | None) -> object:
        known = None if rates is None else tuple(rates.items())
        if self.alike is not None:
            kinds = ((bool(microbatch.media), bool(microbatch.targets)) for microbatch in batch.microbatches)
            return trained, known, tuple(kinds)
        return (
            trained,
            known,
            tuple(
                (
                    microbatch.cost,
                    any(item.encoder in trained.encoders for item in microbatch.media),
                    tuple((item.owner, item.cost) for item in microbatch.media),
                    tuple((item.owner, item.cost) for item in microbatch.targets),
                )
                for microbatch in batch.microbatches
            ),
        )

    def __call__(self, batch: Batch) -> PlannedBatch:
        """Plan a batch that `run_of` has returned."""
        trained, rates = self.trained, self.rates
        key = self._key(batch, trained, rates)
        planned = self.known.pop(key, None)
        if planned is None:
            if len(self.known) >= CACHED_PLANS:
                self.known.pop(next(iter(self.known)))
            needs = trained.needs(batch)
            if self.alike is not None:
                needs = replace(needs, encoded=(bool(trained.encoders),) * len(batch))
            plan, workload = self._plan(batch, trained, needs, rates)
            timeline = simulate(plan, workload)
            order, meeting = timeline.order, plan.meeting  # make_plan has verified it
            order = collective_order(plan, meeting, order) if meeting else order
            if self.alike is not None:
                plan, order = _without_unneeded(plan, order, batch)
            program = with_hints(lower(plan, order, needs)[self.rank], meeting)
            planned = PlannedBatch.of(key, plan, program, needs, timeline, rates is not None, workload, self.rank)
        self.known[key] = planned
        return planned

    def run_of(self, batch: Batch) -> Batch:
        """What of a batch is run: the microbatches that are useful, or all if all pipelines must run equally many."""
        return batch.useful() if self.alike is None else batch.useful_media()

    def _plan(self, batch: Batch, trained: Trained, needs: Needs, rates: Rates | None) -> tuple[Plan, Workload]:
        groups = self.layout.groups(len(batch))
        media, targets = _owned([m.media for m in batch.microbatches]), _owned([m.targets for m in batch.microbatches])
        llm = [m.cost for m in batch.microbatches]
        if self.alike is not None:
            llm = [1.0] * len(batch)
            media = [self._one_each(self.layout.encoder_ranks) if "EF" in self.alike else []] * len(batch)
            targets = [self._one_each(self.layout.generator_ranks) if "G" in self.alike else []] * len(batch)
        schedule, factors = self.options.schedule, self.options.stage_factors
        occurring = (any(map(bool, media)), any(map(bool, targets)))
        costs, stage_costs = trained.costs(self.options.costs, schedule.stages_per_rank, needs, *occurring)
        if factors:
            assert factors != "auto", "not estimated yet"
            one = costs.per_stage(schedule.stages_per_rank)
            rows = stage_costs or [[one.F, one.B, one.I, one.W]] * len(factors)
            stage_costs = [[time * factor for time in row] for row, factor in zip(rows, factors, strict=True)]
        work, media_times, target_times = guessed(costs, stage_costs, llm, media, targets), media, targets
        if rates is not None:
            known = rates if self.alike is None else of_equal_work(rates, self.layout.group_size)
            peers = self.options.parallel.peers
            work = measured(work, known, schedule.stages_per_rank, llm, media, targets, peers)
            media_times, target_times = work.media, work.targets
        workload = work.workload
        encoder, generator = self._shares("EF", media_times, groups), self._shares("G", target_times, groups)
        request = replace(schedule, costs=work.costs).request(
            self.size,
            len(batch),
            workload=workload,
            groups=groups,
            group_pieces=self._pieces(media, groups),
            encoder_shares=encoder if _any(encoder) else None,
            generator_shares=generator if _any(generator) else None,
            stage_costs=work.stage_costs,
            stage_rank=self.options.own_stage_rank,
            meeting=self.options.sharding.meeting,
        )
        return make_plan(request), workload

    def _one_each(self, ranks: Sequence[int] | None) -> list[OwnedCost]:
        """An item for each of these ranks, or of all, as large as the rank's share of the work."""
        weights = self.layout.weights or (1.0,) * self.size
        return [(rank, weights[rank]) for rank in (range(self.size) if ranks is None else ranks)]

    def _pieces(self, items: list[list[OwnedCost]], groups: list[list[int]]) -> list[list[int]]:
        """Per group and rank, the most pieces of its share: no more than the rank has items, as no item is cut."""
        return [
            [
                min(self.options.schedule.pieces, sum(owner == rank for m in group for owner, _ in items[m]))
                for rank in range(self.size)
            ]
            for group in groups
        ]

    def _shares(self, kind: str, items: OwnedCosts, groups: list[list[int]]) -> list[list[float]]:
        """Per group, each rank's fraction of the cost. Where all ranks meet, ranks without items have a small one."""
        rows: list[list[float]] = []
        for group in groups:
            row = [0.0] * self.size
            for m in group:
                for owner, cost in items[m]:
                    row[owner] += cost
            if kind in self.options.sharding.meeting and any(row):
                row = [max(cost, NEGLIGIBLE * sum(row)) for cost in row]
            total = sum(row)
            rows.append([cost / total for cost in row] if total else row)
        return rows


class PlanningCollate:
    """A DataLoader's collate function that also plans the batch, in the worker if there are workers.

    A batch that cannot be planned is passed on without a plan: the runner then raises the error on all ranks.

    Args:
        fingerprints: whether batches also get their `Batch.fingerprint`.
    """

    def __init__(self, collate: Callable[[Any], Any], planner: Planner, fingerprints: bool = False) -> None:
        self.collate, self.planner, self.fingerprints = collate, planner, fingerprints

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if isinstance(batch, Batch) and self.fingerprints:
            batch.fingerprint = fingerprint(batch)
        if isinstance(batch, Batch) and batch.layout == self.planner.layout:
            run = self.planner.run_of(batch)
            if run.microbatches and not run.problem(self.planner.size):
                batch.planned = self.planner(run)
        return batch


def _owned(items: Sequence[Sequence[MediaItem | TargetItem]]) -> list[list[OwnedCost]]:
    """Owner and cost of each microbatch's items. A cost of 0 becomes a small one, as its owner still has to act."""
    least = NEGLIGIBLE * max((item.cost for row in items for item in row), default=0.0) or 1.0
    return [[(item.owner, max(item.cost, least)) for item in row] for row in items]


def _without_unneeded(plan: Plan, order: Sequence[tuple[int, int]], batch: Batch) -> tuple[Plan, list[tuple[int, int]]]:
    """A plan and its order without encoder work of groups that have no media, and generator work of groups without
    targets. Plans for other batches, without other actions, still go together with this one."""
    unneeded: set[tuple[Kind, int]] = set()
    for g, group in enumerate(plan.groups):
        microbatches = [batch.microbatches[m] for m in group]
        if not any(m.media for m in microbatches):
            unneeded |= {("EF", g), ("EB", g)}
        if not any(m.targets for m in microbatches):
            unneeded.add(("G", g))
    kept = [[(a.kind, a.index) not in unneeded for a in row] for row in plan.ranks]
    new = [list(accumulate(row, initial=0)) for row in kept]
    return plan.without(unneeded), [(rank, new[rank][position]) for rank, position in order if kept[rank][position]]


def _any(rows: list[list[float]]) -> bool:
    return any(share > 0 for row in rows for share in row)
