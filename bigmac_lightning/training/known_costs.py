"""Costs of a file, fitted to the model and the stages of a run: what is the same, what is scaled, what is refused."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info  # pyright: ignore[reportPrivateImportUsage]

from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.estimates.partition import make_stages
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.measured_costs import MeanWork, MeasuredCosts
from bigmac_lightning.schedule.rates import Rates
from bigmac_lightning.training import run_facts
from bigmac_lightning.training.agreement import digest_of
from bigmac_lightning.training.options import PipelineOptions

PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}
"""The names that Lightning has for short ones."""


@dataclass(frozen=True)
class KnownRates:
    """Times of actions that are known before a training has measured its own.

    Attributes:
        rates: the times.
        trained: what was trained when they were measured, as `Trained.names`. They hold for nothing else.
    """

    rates: Rates
    trained: tuple[str, ...]


def model_text(module: PipelineModule) -> str:
    """A text that differs if the model differs, or which of the LLM's weights are trained."""
    facts = {name: value for name, value in run_facts.model(module).items() if not name.endswith("_version")}
    trained = module.trained_layers
    facts |= {"trained": json.dumps([trained.below, *(round(share, 6) for share in trained.shares)])}
    return f"{digest_of(facts):015x}"


def precision_text(name: Any) -> str:
    """The whole name of a precision of Lightning."""
    return PRECISIONS.get(str(name), str(name))


def check_known(known: MeasuredCosts, file: str, module: PipelineModule, precision: Any, device: str = "") -> None:
    """Check that costs were measured for this model.

    Args:
        file: the name of their file.
        precision: the Trainer's precision.
        device: the type of the device; "": it is not known.

    Raises:
        ValueError: they were measured for something else; names it.
    """
    again = "measure them again: bigmac profile --config RUN.yaml"
    for what, there, here in (
        ("the model (or which of its weights are trained)", known.model, model_text(module)),
        ("precision", known.precision, precision_text(precision)),
        ("the type of the device", known.device.split(":")[0], device),
    ):
        if here and there != here:
            raise ValueError(f"{file}: {what} differs: it was {there}, and is {here} here; {again}")


def rates_at(
    known: MeasuredCosts,
    module: PipelineModule,
    stages: Sequence[range],
    parallel: ParallelSizes,
    sample_tokens: int = 0,
) -> Rates:
    """The times of the actions of these stages.

    Args:
        stages: the layers of each stage.
        parallel: over how many processes the work of a stage is divided. What was measured with other numbers is
            scaled by the multiplications of each process.
        sample_tokens: see `StageOptions`.
    """
    measured = ParallelSizes(known.tensor_parallel_size, known.context_parallel_size)
    factor = 1.0
    if (measured.tensor, measured.context) != (parallel.tensor, parallel.context):
        factor = _multiplications(module, parallel, sample_tokens) / _multiplications(module, measured, sample_tokens)
    forward, inputs, weights = (costs.parts for costs in module.trained_layers.times(module.llm.costs(sample_tokens)))
    both = [one + other for one, other in zip(inputs, weights, strict=True)]
    return known.at([len(stage) for stage in stages], {"F": forward, "B": both, "I": inputs, "W": weights}, factor)


def known_rates(module: PipelineModule, options: PipelineOptions, size: int) -> KnownRates | None:
    """The times of the file that the schedule names, for the stages of a run; ``None``: it names none.

    Args:
        size: number of the pipeline's ranks, P.
    """
    known = options.known
    if known is None:
        return None
    stages = make_stages(module.llm.costs(), len(options.stage_rank(size)), options.partition)
    scaling = scaling_text(known, stages, options.parallel)
    rank_zero_info(f"Plans are made from the times of {options.schedule.costs_file}{scaling and f': {scaling}'}")
    return KnownRates(rates_at(known, module, stages, options.parallel, options.sample_tokens), known.trained)


def measured_at(
    known: MeasuredCosts, module: PipelineModule, stages: Sequence[range], options: PipelineOptions, work: MeanWork
) -> MeasuredCosts:
    """What would be measured with these stages and microbatches.

    Args:
        options: over how many processes the work of a stage is divided, and the tokens of a sample.
    """
    parallel, layers = options.parallel, tuple(len(stage) for stage in stages)
    measured = ParallelSizes(known.tensor_parallel_size, known.context_parallel_size)
    same = layers == known.layers and (measured.tensor, measured.context) == (parallel.tensor, parallel.context)
    message = known.message and known.message * work.tokens / known.work.tokens
    return replace(
        known,
        rates=rates_at(known, module, stages, parallel, options.sample_tokens),
        work=work,
        layers=layers,
        tensor_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        message=message and message * known.context_parallel_size / parallel.context,
        encoder_unit=_times(known.encoder_unit, work.rows, known.work.rows) if same else None,
        generator_unit=_times(known.generator_unit, work.targets, known.work.targets) if same else None,
        rank_microbatches=tuple(size * work.tokens / known.work.tokens for size in known.rank_microbatches * same),
    )


def _times(size: float | None, work: float, measured: float) -> float | None:
    """Bytes of other work of the same kind than was measured."""
    return None if size is None or not measured else size * work / measured


def costs_of(known: MeasuredCosts, size: int, otherwise: Costs) -> Costs:
    """The costs of the mean microbatch. A kind that was not measured takes as long beside F as `otherwise` says."""
    found = known.costs(size)
    lacking = {
        kind: time * found.F / otherwise.F for kind, time in asdict(otherwise).items() if not asdict(found)[kind]
    }
    return replace(found, **{**lacking, "latency": found.latency})


def scaling_text(known: MeasuredCosts, stages: Sequence[range], parallel: ParallelSizes) -> str:
    """What of the costs is scaled, in words; empty: nothing."""
    texts = list[str]()
    layers = tuple(len(stage) for stage in stages)
    if layers != known.layers:
        texts.append(
            f"stages of {_listed(known.layers)} layers were measured, and times are spread over {_listed(layers)}"
        )
    for name, there in (("tensor", known.tensor_parallel_size), ("context", known.context_parallel_size)):
        if there != (here := getattr(parallel, name)):
            texts.append(f"{name}_parallel_size was {there}, and the LLM's times are scaled to {here}")
    return "; ".join(texts)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _multiplications(module: PipelineModule, sizes: ParallelSizes, sample_tokens: int) -> float:
    """The multiplications of one of the processes, for each token of a microbatch."""
    return sum(module.llm.divided_costs(sizes, sample_tokens).parts) / sizes.context
