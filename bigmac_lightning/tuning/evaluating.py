"""What one choice takes: seconds of a step by simulation, and bytes by the estimate of memory."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.estimates.costs import estimated_costs, media_cost, target_cost
from bigmac_lightning.estimates.forward_cost import ForwardCost
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.partition import make_stages
from bigmac_lightning.estimates.ranks import Precision, RankEstimate, ranks_of
from bigmac_lightning.estimates.step import ReadyParts, StepEstimate
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.measured_costs import MeasuredCosts
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.schedule.rates import Rate, Rates
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.known_costs import costs_of, measured_at
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.stages import resolve_options
from bigmac_lightning.tuning.communication import Device, Sent, sent
from bigmac_lightning.tuning.space import Layout

WEIGHTS, ACTIVATIONS = "weights and optimizer states do not fit", "activations do not fit"


@dataclass(frozen=True)
class Tried:
    """A choice that was simulated.

    Attributes:
        layout, schedule: the choice.
        microbatches: microbatches of a pipeline in a step.
        seconds: of a step, with what is sent.
        computing: seconds in which the mean rank computes.
        sending: seconds of sums and weights at the end of the step.
        memory: bytes on the fullest rank.
        problem: why it is not possible; "": it is.
        plan: its plan; ``None`` if there is none.
    """

    layout: Layout
    schedule: ScheduleOptions
    microbatches: int = 0
    seconds: float = float("inf")
    computing: float = 0.0
    sending: float = 0.0
    memory: float = float("inf")
    problem: str = ""
    plan: Plan | None = None

    @property
    def reason(self) -> str:
        """What its time consists of, in words."""
        idle = max(self.seconds - self.computing - self.sending, 0.0)
        parts = {"computing": self.computing, "idle": idle, "sums and weights": self.sending}
        return ", ".join(f"{name} {time / self.seconds:.0%}" for name, time in parts.items())


@dataclass(frozen=True)
class Problem:
    """What is to be trained, and on what.

    Attributes:
        module: the module on the meta device.
        microbatch: a microbatch of the config.
        step_tokens: tokens of a step, of all pipelines together.
        sample_tokens: see `StageOptions`.
        precision: the bytes of numbers.
        memory: bytes that a process may use.
        device: what it computes and sends in a second.
        schedule: options of the schedule that are not chosen, such as limits.
        known: what was measured of this model; ``None``: multiplications are counted.
    """

    module: PipelineModule
    microbatch: TypicalMicrobatch
    step_tokens: int
    sample_tokens: int
    precision: Precision
    memory: float
    device: Device
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    known: MeasuredCosts | None = None


class Evaluator:
    """Evaluates choices, and remembers what many of them share."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self._was_checkpointing = problem, problem.module.llm.gradient_checkpointing
        self._parts: dict[object, Any] = {}

    # -- a layout ------------------------------------------------------------------------------------------------------

    def why_not(self, layout: Layout) -> str:
        """Why a layout is not possible with any schedule, without looking at memory; "": it may be."""
        module, given = self.problem.module, self.problem.microbatch
        if layout.size > module.llm.num_layers:
            return f"{layout.size} stages are more than {module.llm.num_layers} layers"
        for name, amount in (("tokens", given.tokens), ("targets", given.targets)):
            if (amount * layout.tokens) % 1:
                return f"{amount} {name} of a microbatch cannot be multiplied by {layout.tokens}"
        if given.tokens * layout.tokens < self.problem.sample_tokens:
            return "a sample does not fit into a microbatch"
        if self.problem.step_tokens % round(given.tokens * layout.tokens * layout.replicas):
            return "the tokens of a step cannot be divided so"
        return self._once(("parallel", layout.parallel), lambda: self._why_not_parallel(layout.parallel))

    def _why_not_parallel(self, sizes: ParallelSizes) -> str:
        try:
            PipelineOptions(parallel=sizes)
        except ValueError as problem:
            return str(problem)
        return self.problem.module.llm.why_not_parallel(sizes)

    def microbatch(self, layout: Layout) -> TypicalMicrobatch:
        """What a microbatch holds."""
        given, times = self.problem.microbatch, layout.tokens
        amounts = {name: round(getattr(given, name) * times) for name in ("tokens", "media_rows", "targets")}
        return replace(given, **amounts)

    def microbatches(self, layout: Layout) -> int:
        """How many of them a pipeline has in a step."""
        return self.problem.step_tokens // (self.microbatch(layout).tokens * layout.replicas)

    def guess(self, layout: Layout) -> tuple[float, float]:
        """Roughly the seconds of a step and the bytes of weights, without a simulation.

        Half of the bubbles of plain 1F1B is taken, as encoder and generator work fills some.
        """
        self.prepare(layout)
        p, costs, microbatches = self.problem, self._costs(layout), self.microbatches(layout)
        llm, replicated = self._once("numbers", self._numbers)
        rank = RankEstimate((), int(llm / layout.size / layout.parallel.tensor), int(replicated), 1 / layout.size)
        options = PipelineOptions(sharding=layout.sharding, parallel=layout.parallel)
        moved = self._sent(layout, options, rank, microbatches)
        llm_time = (costs.F + costs.B + moved.forward + moved.backward) * (microbatches + (layout.size - 1) / 2)
        nested = microbatches * (costs.EF + costs.EB + costs.G) / layout.size
        everyone = layout.size * layout.parallel.peers
        sharding, copies = layout.sharding, layout.replicas * layout.parallel.context
        apart = {"ddp": 1, "zero1": everyone * layout.replicas, "fsdp": everyone}
        static = rank.llm / (1 if sharding.stages == "ddp" else copies)
        static += replicated / max(apart[sharding.encoders], apart[sharding.generators])
        return llm_time + nested + moved.step, static * (p.precision.weights or self._number_size)

    def _numbers(self) -> tuple[float, float]:
        """The numbers of parameters of the LLM, and of encoders and generators."""
        module = self.problem.module
        llm = sum(p.numel() for p in module.llm.parameters_of(range(module.llm.num_layers), True, True))
        others = [*module.encoders.parameters(), *module.generators.parameters()]
        return float(llm), float(sum(p.numel() for p in others))

    def is_even(self, layout: Layout) -> bool:
        """Whether stages that are balanced by cost are the even ones, with a stage per rank."""
        self.prepare(layout)
        llm = self.problem.module.llm
        costs = self.problem.module.trained_layers.step(llm.costs(self.problem.sample_tokens))
        return make_stages(costs, layout.size, "auto") == make_stages(costs, layout.size)

    def prepare(self, layout: Layout) -> None:
        """Let the module have the layout's way of saving activations."""
        if self.problem.module.llm.gradient_checkpointing != layout.checkpointing:
            self.problem.module.checkpoint_layers(layout.checkpointing)

    def _once(self, key: object, make: Any) -> Any:
        if key not in self._parts:
            self._parts[key] = make()
        return self._parts[key]

    def _estimated(self, layout: Layout) -> Costs:
        """In TFLOP."""
        p, key = self.problem, (layout.size, layout.parallel, layout.tokens, layout.checkpointing)
        microbatch = self.microbatch(layout)
        return self._once(
            ("estimated", *key),
            lambda: estimated_costs(
                *(p.module, layout.parallel, p.sample_tokens, layout.size, microbatch), *self._nested(layout)
            ),
        )

    def _nested(self, layout: Layout) -> tuple[ForwardCost, ForwardCost]:
        """The costs of the forward of all media of a microbatch, and of one target."""
        module, microbatch = self.problem.module, self.microbatch(layout)
        media = self._once(("media", layout.tokens), lambda: media_cost(module, microbatch))
        return media, self._once("target", lambda: target_cost(module, microbatch))

    def _costs(self, layout: Layout) -> Costs:
        """In seconds, without what is sent."""
        estimated, known = self._estimated(layout), self.problem.known
        if known is None:
            return Costs(**{kind: time / self.problem.device.tflops for kind, time in asdict(estimated).items()})
        stages = [range(self.problem.module.llm.num_layers)]
        return costs_of(self._measured(layout, stages), layout.size, estimated)

    def _measured(self, layout: Layout, stages: Sequence[range]) -> MeasuredCosts:
        p, microbatch = self.problem, self.microbatch(layout)
        assert p.known is not None
        work = p.known.work.with_amounts(microbatch.tokens, microbatch.media_rows, microbatch.targets)
        options = PipelineOptions(sample_tokens=p.sample_tokens, parallel=layout.parallel)
        found = measured_at(p.known, p.module, stages, options, work)
        if layout.checkpointing == self._was_checkpointing:
            return found
        rates = _with_forwards(found.rates, 1 if layout.checkpointing else -1)
        return replace(found, rates=rates, rank_microbatches=())

    # -- a schedule ----------------------------------------------------------------------------------------------------

    def evaluate(self, layout: Layout, schedule: ScheduleOptions) -> Tried:
        """Simulate a choice. What is not possible has a problem."""
        tried = Tried(layout, schedule, self.microbatches(layout))
        try:
            return self._evaluate(tried)
        except ValueError as problem:
            return replace(tried, problem=str(problem).splitlines()[0])

    def _evaluate(self, tried: Tried) -> Tried:
        p, layout, microbatch = self.problem, tried.layout, self.microbatch(tried.layout)
        self.prepare(layout)
        options = PipelineOptions(
            schedule=replace(p.schedule, costs=self._costs(layout), **chosen_of(tried.schedule)),
            partition="auto" if layout.partition == "auto" else "even",
            stage_factors=None if tried.schedule.own_ranks else "auto",
            sample_tokens=p.sample_tokens,
            sharding=layout.sharding,
            parallel=layout.parallel,
        )
        options, stages, _ = resolve_options(p.module, options, layout.size)
        parts = self._ready(layout, options, stages)
        ranks = [rank.summing(p.precision, tried.microbatches) for rank in parts.ranks]
        static = max(rank.static + rank.gathered for rank in ranks)
        if static > p.memory:
            return replace(tried, memory=static, problem=WEIGHTS)
        moved = self._sent(layout, options, max(parts.ranks, key=lambda rank: rank.llm), tried.microbatches)
        measured = None if p.known is None else _with(self._measured(layout, stages), moved, len(stages) / layout.size)
        costs = options.costs
        costs = replace(costs, F=costs.F + moved.forward, B=costs.B + moved.backward, latency=moved.message)
        options = replace(options, schedule=replace(options.schedule, costs=costs))
        step = StepEstimate(
            *(p.module, options, stages, layout.size, microbatch, tried.microbatches, p.precision),
            estimate_costs=False,
            replicas=layout.replicas,
            measured=measured,
            parts=parts,
        )
        memory = max(rank.memory for rank in step.ranks)
        computing = step.timeline.makespan * (1 - step.timeline.bubble_share)
        problem = ACTIVATIONS if memory > p.memory else ""
        seconds = step.timeline.makespan + moved.step
        return replace(
            tried,
            seconds=seconds,
            computing=computing,
            sending=moved.step,
            memory=memory,
            problem=problem,
            plan=step.plan,
        )

    def _ready(self, layout: Layout, options: PipelineOptions, stages: Sequence[range]) -> ReadyParts:
        p = self.problem
        place = (layout.replicas, layout.size, layout.parallel, layout.sharding, layout.checkpointing)
        cut = (tuple(stages), tuple(options.stage_rank(layout.size)))
        module, precision = p.module, p.precision
        return ReadyParts(
            *self._nested(layout),
            self._estimated(layout),
            self._once(
                ("ranks", *place, *cut),
                lambda: ranks_of(module, options, stages, layout.size, precision, layout.replicas),
            ),
        )

    def _sent(self, layout: Layout, options: PipelineOptions, rank: RankEstimate, microbatches: int) -> Sent:
        p, known = self.problem, self.problem.known
        tokens = self.microbatch(layout).tokens / layout.parallel.context
        made = sent(
            options,
            layout.size,
            layout.replicas,
            p.module.llm.num_layers,
            tokens * p.module.llm.width,
            self._number_size,
            rank,
            microbatches,
            layout.checkpointing,
            p.device,
        )
        measured = known and (known.tensor_parallel_size, known.context_parallel_size)
        if measured == (layout.parallel.tensor, layout.parallel.context):  # what peers send is in their times
            return replace(made, forward=0.0, backward=0.0)
        return made

    @cached_property
    def _number_size(self) -> float:
        llm = self.problem.module.llm
        return self.problem.precision.activations or (llm.dtype.itemsize if llm.dtype else 4)


def chosen_of(schedule: ScheduleOptions) -> dict[str, Any]:
    """The options of a schedule that a search chooses."""
    names = ("policy", "backbone", "group_size", "virtual_stages", "pieces")
    return {name: getattr(schedule, name) for name in names}


def _with(measured: MeasuredCosts, moved: Sent, virtual_stages: float) -> MeasuredCosts:
    """What was measured, and what is sent besides by each stage. Messages between ranks were measured."""
    further = {"F": moved.forward / virtual_stages, "B": moved.backward / virtual_stages}
    rates = {
        (kind, stage): Rate(rate.each + further.get(kind, 0.0), rate.per_cost, rate.mean)
        for (kind, stage), rate in measured.rates.items()
    }
    return replace(measured, rates=rates)


def _with_forwards(rates: Rates, times: int) -> Rates:
    """Rates in which backwards run so many forwards more."""
    made = dict(rates)
    for (kind, stage), rate in rates.items():
        forward = rates.get(("F", stage))
        if kind in ("B", "I") and forward is not None:
            each, per_cost = rate.each + times * forward.each, rate.per_cost + times * forward.per_cost
            made[kind, stage] = Rate(max(each, 0.0), max(per_cost, 0.0), rate.mean)
    return made
