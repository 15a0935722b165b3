"""The costs of a microbatch, estimated from a module without weights, as counted multiplications."""

from collections.abc import Iterable

from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel, trained_share
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.estimates.forward_cost import ForwardCost
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.schedule.costs import Costs

TERA = 1e12
FLOP = 2
"""Floating-point operations in a multiplication with its addition."""


def media_cost(module: PipelineModule, microbatch: TypicalMicrobatch) -> ForwardCost:
    """The cost of the forward of all media of a microbatch."""
    encoders = [e for e in module.encoders.values() if isinstance(e, Encoder)]
    item = _mean(e.forward_cost(microbatch.item_rows) for e in encoders)
    return item * (microbatch.media_rows / microbatch.item_rows)


def target_cost(module: PipelineModule, microbatch: TypicalMicrobatch) -> ForwardCost:
    """The cost of the forward of one target."""
    return _mean(g.forward_cost(microbatch.target_shape, microbatch.target_rows) for g in _generators(module))


def estimated_costs(
    module: PipelineModule,
    parallel: ParallelSizes,
    sample_tokens: int,
    size: int,
    microbatch: TypicalMicrobatch,
    media: ForwardCost | None = None,
    target: ForwardCost | None = None,
) -> Costs:
    """The costs of a microbatch in TFLOP, of one of the processes that a rank consists of.

    F, B, I and W are those of the mean rank with all layers trained, as `Trained` leaves out what frozen layers do not
    need. EF and EB are those of all media, with all weights of the encoders trained, for the same reason. G is that of
    all targets, with what is trained of the generators.

    Args:
        parallel: over how many processes the work of a stage is divided.
        sample_tokens: see `StageOptions`.
        size: number of the pipeline's ranks, P.
        media, target: see `media_cost` and `target_cost`, if they are known already.
    """
    per_multiplication = FLOP * microbatch.tokens / parallel.context / TERA
    forward = per_multiplication * sum(module.llm.divided_costs(parallel, sample_tokens).parts) / size
    again = forward * module.llm.gradient_checkpointing
    both = media or media_cost(module, microbatch), target or target_cost(module, microbatch)
    encoder, drawn = (FLOP * cost.multiplications / parallel.peers / TERA for cost in both)
    encoders, generators = module.encoders.values(), _generators(module)
    passes = passes_of(generators, module.trained_layers.passes[-1])
    passes += _all_checkpointed(generators) * (passes > 1)
    return Costs(
        F=forward,
        B=2 * forward + again,
        I=forward + again,
        W=forward,
        EF=encoder,
        EB=encoder * (2 + _all_checkpointed(encoders)),
        G=drawn * microbatch.targets * passes,
    )


def counts_multiplications(llm: LanguageModel) -> bool:
    """Whether an LLM says what it costs in multiplications, and not only that all layers cost the same."""
    return type(llm).costs is not LanguageModel.costs


def passes_of(generators: Iterable[Generator], passes_below: bool) -> float:
    """How many times as much as its forward a generator's forward and backward take, without what is computed again.

    Args:
        passes_below: whether the LLM has to get gradients.
    """
    share = trained_share(parameter for generator in generators for parameter in generator.parameters())
    return 1 + (share > 0 or passes_below) + share


def can_be_estimated(module: PipelineModule, microbatch: TypicalMicrobatch) -> bool:
    """Whether all components say what they cost in multiplications, so that their times can be compared."""
    says = counts_multiplications(module.llm)
    encoded = not module.encoders or media_cost(module, microbatch).multiplications > 0
    return says and encoded and (not module.generators or target_cost(module, microbatch).multiplications > 0)


def _generators(module: PipelineModule) -> list[Generator]:
    return [generator for generator in module.generators.values() if isinstance(generator, Generator)]


def _all_checkpointed(components: Iterable[object]) -> bool:
    found = [getattr(component, "gradient_checkpointing", False) for component in components]
    return bool(found) and all(found)


def _mean(costs: Iterable[ForwardCost]) -> ForwardCost:
    """The mean over components with matrices of their own. A video encoder that uses those of the image encoder has
    none, and would halve the mean."""
    found = [cost for cost in costs if cost.multiplications]
    return sum(found, ForwardCost()) * (1 / len(found)) if found else ForwardCost()
