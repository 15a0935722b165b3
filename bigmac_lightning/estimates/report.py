"""What a run will need, before it runs: stages, parameters, memory and time of each rank, of a module without weights.

All of it is estimated, but for the parameters. Knows modules, options and plans; knows no processes and no data.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, TargetItem, assign_owners
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel, trained_share
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.token_loss import CHUNK_ELEMENTS
from bigmac_lightning.estimates.partition import LayerCosts
from bigmac_lightning.estimates.work import Work
from bigmac_lightning.schedule.budget import size_text
from bigmac_lightning.schedule.make import POLICIES
from bigmac_lightning.schedule.plan import Costs, Plan
from bigmac_lightning.schedule.simulate import Timeline, simulate
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.planner import Planner, Trained
from bigmac_lightning.training.runner import part_of
from bigmac_lightning.training.trained import trained_with

TERA = 1e12


@dataclass(frozen=True)
class TypicalMicrobatch:
    """What a microbatch is taken to hold.

    Attributes:
        tokens: of the LLM, all of them labelled.
        media_rows: of these, those that encoders make.
        item_rows: of one media item.
        targets: of generators.
        target_rows: that condition one.
        target_shape: of one.
    """

    tokens: int = 4096
    media_rows: int = 0
    item_rows: int = 256
    targets: int = 0
    target_rows: int = 64
    target_shape: tuple[int, ...] = (3, 512, 512)

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("media_rows", 0), ("item_rows", 1), ("targets", 0), ("target_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"microbatch.{name} is {getattr(self, name)}; expected at least {least}")

    @property
    def items(self) -> int:
        """Media items, the last one smaller."""
        return -(-self.media_rows // self.item_rows)


@dataclass(frozen=True)
class Precision:
    """Bytes of a number.

    Attributes:
        weights: of a weight; ``None``: as the module has it.
        activations: of a number kept for the backward; ``None``: as the LLM's weights.
    """

    weights: int | None = None
    activations: int | None = None

    @classmethod
    def of(cls, name: str | int | None) -> "Precision":
        """By Lightning's name, such as "bf16-mixed"."""
        text = str(name or "32-true")
        size = 2 if "16" in text or "transformer-engine" in text else 8 if "64" in text else None
        return cls(size if text.endswith("-true") or text == "64" else None, size)

    def static(self, component: Encoder | LanguageModel | Generator, parameters: Iterable[nn.Parameter]) -> int:
        """Of these weights of a component, with the gradients and AdamW's two moments of those that are trained."""
        made = self.weights or (component.dtype.itemsize if component.dtype else None)
        return sum(p.numel() * (made or p.element_size()) * (4 if p.requires_grad else 1) for p in parameters)


@dataclass(frozen=True)
class RankReport:
    """What a rank has, does and needs; sizes in bytes.

    Attributes:
        layers: of each of its stages.
        llm, replicated: parameters: its part of the LLM, and the encoders and generators, which are on all ranks.
        share: of the LLM's time.
        static: weights, gradients and AdamW's two moments.
        activations: by "LLM", "encoder", "generator" and "logits", at their peaks; empty: not estimated.
        work: TFLOP in a step.
    """

    layers: tuple[range, ...]
    llm: int
    replicated: int
    share: float
    static: int = 0
    activations: dict[str, float] = field(default_factory=dict)
    work: float = 0.0

    @property
    def memory(self) -> float:
        """All together, as if all peaks came at once."""
        return self.static + sum(self.activations.values())


def ranks_of(
    module: PipelineModule,
    options: PipelineOptions,
    stages: Sequence[range],
    size: int,
    precision: Precision = Precision(),
) -> list[RankReport]:
    """What each rank has.

    Args:
        module: on the meta device.
        options, stages: as `settled` gives them.
        size: ranks of the pipeline, P.
    """
    stage_rank, made = options.stage_rank(size), list[RankReport]()
    replicated = {component: list(component.parameters()) for component in _replicated(module)}
    count = sum(map(_count, replicated.values()))
    static = sum(precision.static(component, parameters) for component, parameters in replicated.items())
    times = module.trained_layers.step(module.llm.costs(options.sample_tokens))
    whole = sum(times.of(stage) for stage in stages)
    for rank in range(size):
        part = part_of(rank, stages, stage_rank)
        own = list(module.llm.parameters_of(part.layers or (), part.embedding, part.head))
        layers = tuple(stages[s] for s, owner in enumerate(stage_rank) if owner == rank)
        share = sum(times.of(stage) for stage in layers) / whole
        made.append(RankReport(layers, _count(own), count, share, static + precision.static(module.llm, own)))
    return made


class StepEstimate:
    """A typical step of a module: costs, plan, and each rank's memory and work.

    Attributes:
        costs: that the plan assumes: the options' own, or, in TFLOP, estimated.
        plan, timeline: of the step.
        ranks: what each rank needs.
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
    ) -> None:
        """
        Args:
            module, options, stages, size: as of `ranks_of`.
            microbatch: what each microbatch holds.
            microbatches: of a step, M.
            estimate_costs: plan with estimated costs instead of the options'.

        Raises:
            ValueError: no plan is possible within the options' caps.
        """
        self.module, self.options, self.stages, self.size = module, options, stages, size
        self.microbatch, self.precision = microbatch, precision
        self._number = precision.activations or (module.llm.dtype or torch.float32).itemsize
        self._encoder = self._encoder_work()
        self._target = _mean(g.work(microbatch.target_shape, microbatch.target_rows) for g in _generators(module))
        estimated = self._costs()
        self.costs = options.costs
        if estimate_costs:
            self.costs = estimated
            own_ranks = POLICIES[options.policy].own_ranks
            factors = None if own_ranks else self._stage_factors()
            options = replace(options, costs=self.costs, stage_factors=factors)
        planner = Planner(options, size, 0, self._trained())
        self.plan: Plan = planner(self._batch(microbatches)).plan
        self.timeline: Timeline = simulate(self.plan)
        ranks = ranks_of(module, self.options, stages, size, precision)
        self.ranks = [
            replace(held, activations=self._activations(rank, held), work=self._work(rank, held, estimated))
            for rank, held in enumerate(ranks)
        ]

    # -- time ----------------------------------------------------------------------------------------------------------

    def _encoder_work(self) -> Work:
        """Of the forward on the media of a microbatch."""
        encoders = [e for e in self.module.encoders.values() if isinstance(e, Encoder)]
        item = _mean(e.work(self.microbatch.item_rows) for e in encoders)
        return item * (self.microbatch.media_rows / self.microbatch.item_rows)

    def _costs(self) -> Costs:
        """TFLOP of a microbatch: of the LLM on the mean rank with everything trained, as `Trained` cuts off what is
        frozen; of all of its media, and of all of its targets with what their generators train."""
        module, work = self.module, 2 * self.microbatch.tokens / TERA
        costs = module.llm.costs(self.options.sample_tokens)
        forward = work * sum(costs.of(stage) for stage in self.stages) / self.size
        again = forward * module.llm.gradient_checkpointing
        encoder, target = (2 * w.multiplications / TERA for w in (self._encoder, self._target))
        encoders, generators = module.encoders.values(), _generators(module)
        share = trained_share(module.generators.parameters())
        through = share > 0 or module.trained_layers.passes[-1]
        passes = 1 + through * (1 + _all_checkpointed(generators)) + share
        return Costs(
            F=forward,
            B=2 * forward + again,
            I=forward + again,
            W=forward,
            EF=encoder,
            EB=encoder * (2 + _all_checkpointed(encoders)),
            G=target * self.microbatch.targets * passes,
        )

    def _stage_factors(self) -> tuple[float, ...]:
        costs = self.module.llm.costs(self.options.sample_tokens)
        factors = replace(self.options, stage_factors="auto").estimated(costs, self.stages).stage_factors
        assert isinstance(factors, tuple)
        return factors

    def _trained(self) -> Trained:
        """As the pipeline will find it."""
        module, trained = self.module, self.module.trained_layers
        last = len(self.stages) - 1
        encoders = any(parameter.requires_grad for parameter in module.encoders.parameters())
        adapters = trained.below and not encoders  # what else would gradients go all the way down for?
        weights = list[bool]()
        for s, stage in enumerate(self.stages):
            parts = range(stage.start + (s > 0), stage.stop + 1 + (s == last))
            weights.append(adapters or any(trained.shares[part] > 0 for part in parts))
        return trained_with(module, weights)

    def _batch(self, microbatches: int) -> Batch:
        """A batch of typical microbatches, without any contents."""
        given, layout = self.microbatch, self.options.layout(self.size, 0)
        encoder, generator = next(iter(self.module.encoders), ""), next(iter(self.module.generators), "")
        one = torch.zeros(1, dtype=torch.long)
        made = [
            Microbatch(
                {"input_ids": torch.empty(1, given.tokens, device="meta")},
                label_positions=one,
                labels=one,
                media=[MediaItem(encoder, given.item_rows) for _ in range(given.items)] if encoder else [],
                targets=[
                    TargetItem(generator, given.target_rows, given.target_shape)
                    for _ in range(given.targets if generator else 0)
                ],
            )
            for _ in range(microbatches)
        ]
        assign_owners(made, layout)
        return Batch(made, layout)

    def _work(self, rank: int, held: RankReport, costs: Costs) -> float:
        """TFLOP of a rank in a step; `costs` are estimated."""
        plan, trained = self.plan, self._trained()
        times = self.module.trained_layers.step(self.module.llm.costs(self.options.sample_tokens))
        llm = 2 * self.microbatch.tokens / TERA * sum(times.of(stage) for stage in held.layers)
        backward = costs.EB * trained.encoder_backward if trained.encoders else 0.0
        unit = costs.EF * (1 + plan.recomputes) + backward
        encoder = sum(_of_rank(plan.encoder_shares, plan, rank)) * unit
        return llm * plan.microbatches + encoder + sum(_of_rank(plan.generator_shares, plan, rank)) * costs.G

    # -- memory --------------------------------------------------------------------------------------------------------

    def _activations(self, rank: int, held: RankReport) -> dict[str, float]:
        """Peak bytes by component: of what has a backward, as if all of its weights were trained."""
        given, llm, number, passes = self.microbatch, self.module.llm, self._number, self.module.trained_layers.passes
        kept = LayerCosts.of_parts([size * there for size, there in zip(llm.kept().parts, passes, strict=True)])
        at_once = 0.0
        if llm.gradient_checkpointing:
            at_once = max((kept.layers[k] for stage in held.layers for k in stage), default=0.0)
            kept = replace(kept, layers=tuple(llm.width * there for there in passes[1:-1]))
        alive = sum(kept.of(stage) for stage in held.layers)
        microbatches = self.timeline.llm_microbatches[rank]
        found = {"LLM": given.tokens * number * (alive * microbatches + at_once)}
        if self._encoder.kept:
            trained = self._trained()
            unit = self._encoder.kept * trained.encoder_backward if trained.encoders else 0.0
            found["encoder"] = self.timeline.encoder_units[rank] * unit * number
        if self._target.kept:
            targets = max(_of_rank(self.plan.generator_shares, self.plan, rank), default=0.0) * given.targets
            found["generator"] = targets * self._target.kept * number
        head = any(stage.stop == llm.num_layers for stage in held.layers)
        elements = min(given.tokens * llm.vocabulary, CHUNK_ELEMENTS) if head else 0
        found["logits"] = elements * (
            8 + (number if number < 4 else 0)
        )  # log-probabilities and their gradient, in fp32
        return found


def partition_table(ranks: Sequence[RankReport]) -> Table:
    """A line for each rank: layers, parameters and time; and memory and work, where they are estimated."""
    kinds = list(ranks[0].activations)
    table = Table(title="stages of the LLM; times are estimated", title_justify="left", caption_justify="left")
    for heading in ("rank", "layers", "LLM parameters", "encoders + generators", "of the LLM's time"):
        table.add_column(heading, justify="right")
    if kinds:
        table.title = "estimated needs of each rank"
        for heading in ("static memory", *(f"{kind}, peak" for kind in kinds), "memory", "TFLOP per step"):
            table.add_column(heading, justify="right")
    for number, rank in enumerate(ranks):
        sizes = [rank.static, *rank.activations.values(), rank.memory] if kinds else []
        table.add_row(
            str(number),
            ", ".join(f"{stage.start}..{stage.stop - 1}" for stage in rank.layers) or "none",
            count_text(rank.llm),
            count_text(rank.replicated),
            f"{rank.share:.1%}",
            *(size_text(size) for size in sizes),
            *([f"{rank.work:.4g}"] if kinds else []),
        )
    return table


def as_text(table: Table) -> str:
    """For a log."""
    file = StringIO()
    Console(file=file, width=120).print(table)
    return file.getvalue()


def count_text(count: float) -> str:
    """Numbers of parameters for people: "30.53 B"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:g}"


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _replicated(module: PipelineModule) -> list[Encoder | Generator]:
    found = [*module.encoders.values(), *module.generators.values()]
    return [component for component in found if isinstance(component, Encoder | Generator)]


def _generators(module: PipelineModule) -> list[Generator]:
    return [generator for generator in module.generators.values() if isinstance(generator, Generator)]


def _all_checkpointed(components: Iterable[object]) -> bool:
    found = [getattr(component, "gradient_checkpointing", False) for component in components]
    return bool(found) and all(found)


def _mean(works: Iterable[Work]) -> Work:
    """Of the components that do anything (an encoder may be another one's under a second name)."""
    found = [work for work in works if work.multiplications]
    return sum(found, Work()) * (1 / len(found)) if found else Work()


def _of_rank(shares: Sequence[Sequence[float]], plan: Plan, rank: int) -> list[float]:
    """Microbatches' worth of each group's work that a rank does."""
    return [row[rank] * len(group) for row, group in zip(shares, plan.groups, strict=True)] if shares else []
