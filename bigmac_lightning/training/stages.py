"""How the LLM is cut into stages, and which part of it a rank has, alone or together with its peers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bigmac_lightning.contracts.module import Part, PipelineModule
from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.estimates.costs import can_be_estimated, estimated_costs
from bigmac_lightning.estimates.microbatch import TypicalMicrobatch
from bigmac_lightning.estimates.partition import make_stages
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.training.known_costs import costs_of
from bigmac_lightning.training.options import DEFAULT_COSTS, PipelineOptions


def part_of(rank: int, stages: Sequence[range], stage_rank: Sequence[int]) -> Part:
    """The part of the LLM that a pipeline rank has."""
    own = [s for s, owner in enumerate(stage_rank) if owner == rank]
    return Part(
        layers=tuple(layer for s in own for layer in stages[s]),
        embedding=0 in own,
        head=len(stages) - 1 in own,
    )


def peers_of(mesh: PipelineMesh, sizes: ParallelSizes) -> StagePeers | None:
    """The processes that compute a stage together with this one; ``None`` if it computes it alone."""
    if mesh.peers == 1:
        return None
    tensor = mesh.mesh["tp"] if mesh.tp_size > 1 else None
    return StagePeers(
        tensor=tensor,
        context=mesh.mesh["cp"] if mesh.cp_size > 1 else None,
        expert=tensor if sizes.expert > 1 else None,
        experts_see_same_tokens=True,
    )


def typical_microbatch(module: PipelineModule, data: Any) -> TypicalMicrobatch | None:
    """The microbatch that estimates assume in a run, if its DataModule says how many tokens it has."""
    amounts = getattr(data, "typical_amounts", {})  # `ParallelDataModule` has them
    return TypicalMicrobatch.of_data(amounts, bool(module.encoders), bool(module.generators)) if amounts else None


def resolve_options(
    module: PipelineModule, options: PipelineOptions, size: int, microbatch: TypicalMicrobatch | None = None
) -> tuple[PipelineOptions, list[range], str]:
    """The options without anything left open, the layers of each stage, and why "auto" became what it is.

    The same on all ranks.

    Args:
        module: with or without its weights.
        size: number of the pipeline's ranks, P.
        microbatch: what a microbatch holds, for estimates of costs that are neither given nor measured; ``None``: it is
            not known, and costs are guessed.

    Raises:
        ValueError: the LLM cannot be cut into so many stages, or no plan is possible.
    """
    layers = module.llm.num_layers
    if options.known is not None:
        options = replace(options, assumed=costs_of(options.known, size, DEFAULT_COSTS))
    elif microbatch is not None and can_be_estimated(module, microbatch):
        parallel, sample_tokens = options.parallel, options.sample_tokens
        options = replace(options, assumed=estimated_costs(module, parallel, sample_tokens, size, microbatch))
    options, reason = options.resolved(size, layers, bool(module.encoders), bool(module.generators))
    costs = module.llm.costs(options.sample_tokens)
    stages = make_stages(module.trained_layers.step(costs), len(options.stage_rank(size)), options.partition)
    options = replace(options, partition=tuple(len(stage) for stage in stages))
    return options.estimated(costs, stages), stages, reason
