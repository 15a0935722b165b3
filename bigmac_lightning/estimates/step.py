"""What one training step of a module will take, estimated from the module on the meta device.

The costs of a microbatch come from counted multiplications. A plan is made with them and simulated, and the plan tells
how many microbatches and encoder units are alive on each rank at the peak.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.token_loss import CHUNK_ELEMENTS
from bigmac_lightning.estimates.costs import FLOP, TERA, estimated_costs, media_cost, target_cost
from bigmac_lightning.estimates.forward_cost import ForwardCost
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.partition import LayerCosts
from bigmac_lightning.estimates.ranks import Precision, RankEstimate, ranks_of
from bigmac_lightning.schedule.liveness import generator_units
from bigmac_lightning.schedule.measured_costs import MeasuredCosts
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.simulate import Timeline, simulate
from bigmac_lightning.training.known_costs import costs_of
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.planner import PlannedBatch, Planner
from bigmac_lightning.training.trained import Trained, nested_kinds, trained_with


@dataclass(frozen=True)
class ReadyParts:
    """Parts of an estimate that are the same for many plans.

    Attributes:
        media, target: see `media_cost` and `target_cost`.
        estimated: see `estimated_costs`.
        ranks: see `ranks_of`.
    """

    media: ForwardCost
    target: ForwardCost
    estimated: Costs
    ranks: Sequence[RankEstimate]

    @classmethod
    def of(
        cls,
        module: PipelineModule,
        options: PipelineOptions,
        stages: Sequence[range],
        size: int,
        microbatch: TypicalMicrobatch,
        precision: Precision,
        replicas: int,
    ) -> "ReadyParts":
        return cls(
            media_cost(module, microbatch),
            target_cost(module, microbatch),
            estimated_costs(module, options.parallel, options.sample_tokens, size, microbatch),
            ranks_of(module, options, stages, size, precision, replicas),
        )


class StepEstimate:
    """The estimate of a step, which has numbers for the mean microbatch.

    Attributes:
        costs: what the plan was made with: the estimated costs in TFLOP, the costs of the options, or measured ones.
        seconds: whether these are measured times.
        plan: the plan of the step.
        workload: the work of its microbatches, in the unit of the costs.
        timeline: the simulation of the plan.
        ranks: what each rank holds, computes and needs.
    """

    def __init__(
        self,
        module: PipelineModule,
        options: PipelineOptions,
        stages: Sequence[range],
        size: int,
        microbatch: TypicalMicrobatch,
        microbatches: int,
        precision: Precision,
        estimate_costs: bool = True,
        replicas: int = 1,
        measured: MeasuredCosts | None = None,
        parts: ReadyParts | None = None,
        batch: Batch | None = None,
    ) -> None:
        """
        Args:
            module, options, stages, size, precision, replicas: see `ranks_of`.
            microbatch: what each microbatch holds.
            microbatches: the number of microbatches in a step, M.
            estimate_costs: whether to plan with estimated costs instead of the costs of the options.
            measured: what was measured of these stages and microbatches, for a plan in seconds.
            parts: what is known already.
            batch: the batch that is planned, as a training with these options would at its start; ``None``: one of
                such microbatches, with the best costs that are known.

        Raises:
            ValueError: no plan is possible within the caps of the options.
        """
        self.module, self.options, self.stages, self.size = module, options, stages, size
        self.microbatch, self.precision = microbatch, precision
        self._peers = options.parallel.peers
        self._tokens = microbatch.tokens / options.parallel.context
        self._llm_costs = module.llm.divided_costs(options.parallel, options.sample_tokens)
        self._number_size = precision.activations or (module.llm.dtype or torch.float32).itemsize
        parts = parts or ReadyParts.of(module, options, stages, size, microbatch, precision, replicas)
        self._media, self._target, estimated = parts.media, parts.target, parts.estimated
        self._trained = self._find_trained()
        self.costs, self.seconds, self.measured = options.costs, measured is not None, measured
        if batch is not None:
            planned = self._as_training(batch, replicas)
            self.costs = planned.plan.costs
        else:
            planned = self._of_equal(microbatches, estimate_costs, estimated)
        self.plan: Plan = planned.plan
        self.workload = planned.workload
        self.timeline: Timeline = simulate(self.plan, planned.workload)
        self.ranks = [
            replace(held, activations=self._activations(rank, held), tflop=self._tflop(rank, held, estimated))
            for rank, held in enumerate(rank.summing(precision, microbatches) for rank in parts.ranks)
        ]

    def _as_training(self, batch: Batch, replicas: int) -> PlannedBatch:
        """The plan of a batch as a training makes it before it has measured anything."""
        options, module, trained, measured = self.options, self.module, self._trained, self.measured
        together = options.sharding.stages == "fsdp" and replicas * options.parallel.context > 1
        alike = nested_kinds(module) if together else None
        planner = Planner(options, self.size, 0, trained, module.encoders, alike)
        self.seconds = measured is not None and measured.trained == trained.names
        if measured is not None and self.seconds:
            planner.rates = measured.rates
        run = planner.run_of(batch)
        if not run.microbatches:
            raise ValueError("no microbatch of the first batch has anything to learn from, so there is nothing to plan")
        return planner(run)

    def _of_equal(self, microbatches: int, estimate_costs: bool, estimated: Costs) -> PlannedBatch:
        """The plan of a step whose microbatches are all alike."""
        options, module, size, measured = self.options, self.module, self.size, self.measured
        if estimate_costs:
            self.costs = costs_of(measured, size, estimated) if measured else estimated
            factors = None if measured or options.schedule.own_ranks else self._stage_factors()
            schedule = replace(options.schedule, costs=self.costs)
            options = replace(options, schedule=schedule, stage_factors=factors)
        encoder, generator = next(iter(module.encoders), ""), next(iter(module.generators), "")
        batch = self.microbatch.batch(microbatches, options.layout(size, 0), encoder, generator)
        planner = Planner(options, size, 0, self._trained)
        if measured:
            planner.rates = measured.of_equal_work(self.microbatch.items, self.microbatch.targets)
        return planner(batch)

    # -- time ----------------------------------------------------------------------------------------------------------

    def _stage_factors(self) -> tuple[float, ...]:
        """How long each stage takes, relative to the mean stage."""
        options = replace(self.options, stage_factors="auto")
        factors = options.estimated(self._llm_costs, self.stages).stage_factors
        assert isinstance(factors, tuple)
        return factors

    def _find_trained(self) -> Trained:
        """What the pipeline will find to be trained."""
        module, trained = self.module, self.module.trained_layers
        last = len(self.stages) - 1
        encoders = any(parameter.requires_grad for parameter in module.encoders.parameters())
        # Without trained encoders, only adapters in all layers need gradients all the way down.
        adapters = trained.below and not encoders
        weights = list[bool]()
        for s, stage in enumerate(self.stages):
            parts = range(stage.start + (s > 0), stage.stop + 1 + (s == last))
            weights.append(adapters or any(trained.shares[part] > 0 for part in parts))
        ranks = self.options.stage_rank(self.size)
        some = {
            rank for rank, trains in zip(ranks, weights, strict=True) if trains
        }  # a rank's stages are not told apart
        return trained_with(module, [rank in some for rank in ranks])

    def _tflop(self, rank: int, held: RankEstimate, costs: Costs) -> float:
        """The TFLOP of a rank in a step.

        Args:
            held: what the rank holds.
            costs: the estimated costs, in TFLOP.
        """
        plan = self.plan
        times = self.module.trained_layers.step(self._llm_costs)
        llm = FLOP * self._tokens / TERA * sum(times.of(stage) for stage in held.layers)
        backward = costs.EB * self._trained.encoder_backward if self._trained.encoders else 0.0
        unit = costs.EF * (1 + plan.recomputes) + backward
        encoder = self._of_rank("EF", plan.encoder_shares, rank) * unit
        return llm * plan.microbatches + encoder + self._of_rank("G", plan.generator_shares, rank) * costs.G

    def _of_rank(self, kind: str, shares: Sequence[Sequence[float]], rank: int) -> float:
        """How many mean microbatches' worth of items a rank gets."""
        total = self.workload.total(kind)
        groups = [self.workload.total(kind, group) for group in self.plan.groups] if shares and total else []
        parts = (row[rank] * work for row, work in zip(shares, groups, strict=False))
        return sum(parts) * self.plan.microbatches / total if groups else 0.0

    # -- memory --------------------------------------------------------------------------------------------------------

    def _activations(self, rank: int, held: RankEstimate) -> dict[str, float]:
        """Bytes at the peak by component, as measured, or else by an estimate, in which whatever has a backward counts
        as if all of its weights were trained."""
        given, llm, size, parallel = self.microbatch, self.module.llm, self._number_size, self.options.parallel
        passes, activations = self.module.trained_layers.passes, llm.divided_activations(parallel)
        saved = LayerCosts.of_parts([numbers * there for numbers, there in zip(activations.parts, passes, strict=True)])
        at_once = 0.0
        if llm.gradient_checkpointing:
            at_once = max((saved.layers[k] for stage in held.layers for k in stage), default=0.0)
            saved = replace(saved, layers=tuple(llm.width * there for there in passes[1:-1]))
        alive = sum(saved.of(stage) for stage in held.layers)
        microbatches = self.timeline.llm_microbatches[rank]
        found = {"LLM": self._tokens * size * (alive * microbatches + at_once)}
        known = self.measured
        if known and len(known.rank_microbatches) == self.size:
            found["LLM"] = known.rank_microbatches[rank] * microbatches
        if known and known.encoder_unit:
            found["encoder"] = known.encoder_unit * self.timeline.encoder_units[rank]
        elif self._media.activations:
            unit = self._media.activations * self._trained.encoder_backward if self._trained.encoders else 0.0
            found["encoder"] = self._of_process(self.timeline.encoder_units[rank], given.items) * unit * size
        if known and known.generator_unit:
            found["generator"] = known.generator_unit * generator_units(self.plan, rank)
        elif self._target.activations:
            targets = self._of_process(generator_units(self.plan, rank), given.targets) * given.targets
            found["generator"] = targets * self._target.activations * size
        head = any(stage.stop == llm.num_layers for stage in held.layers)
        elements = min(self._tokens * llm.vocabulary / parallel.tensor, CHUNK_ELEMENTS) if head else 0
        # log-probabilities and their gradient in float32, and the logits themselves where these are narrower
        found["logits"] = elements * (8 + (size if size < 4 else 0))
        return found

    def _of_process(self, units: float, items: int) -> float:
        """How many of a rank's units one of its processes has; at least one of the items of a microbatch, as items are
        never split, if the rank has any."""
        return max(units / self._peers, min(units, 1 / items)) if items else 0.0
