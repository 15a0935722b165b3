"""What each rank of a pipeline holds: its layers, its parameters, and the memory that these take from start to end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import part_of


@dataclass(frozen=True)
class Precision:
    """The bytes that a number takes.

    Attributes:
        weights: bytes of a weight; ``None``: as many as the weights of the module have.
        activations: bytes of a number that is saved for the backward; ``None``: as many as a weight of the LLM.
    """

    weights: int | None = None
    activations: int | None = None

    @classmethod
    def of(cls, name: str | int | None) -> "Precision":
        """The precision of Lightning with a name such as "bf16-mixed"."""
        text = str(name or "32-true")
        size = 2 if "16" in text or "transformer-engine" in text else 8 if "64" in text else None
        return cls(size if text.endswith("-true") or text == "64" else None, size)

    def static(self, component: Encoder | LanguageModel | Generator, parameters: Iterable[nn.Parameter]) -> int:
        """The bytes of these weights of a component. A trained weight has a gradient and AdamW's two moments besides,
        so it counts four times."""
        size = self.weights or (component.dtype.itemsize if component.dtype else None)
        return sum(p.numel() * (size or p.element_size()) * (4 if p.requires_grad else 1) for p in parameters)


@dataclass(frozen=True)
class RankEstimate:
    """What a rank holds, computes and needs.

    Attributes:
        layers: the layers of each of its stages.
        llm: the number of parameters of its part of the LLM.
        replicated: the number of parameters of encoders and generators, which every rank has.
        share: its share of the LLM's time.
        static: bytes of weights, gradients and AdamW's two moments.
        activations: bytes at the peak, by "LLM", "encoder", "generator" and "logits"; empty: not estimated.
        tflop: TFLOP in a step.
    """

    layers: tuple[range, ...]
    llm: int
    replicated: int
    share: float
    static: int = 0
    activations: dict[str, float] = field(default_factory=dict)
    tflop: float = 0.0

    @property
    def memory(self) -> float:
        """Bytes of everything together. That is an upper bound, as the peaks need not come at the same time."""
        return self.static + sum(self.activations.values())


def ranks_of(
    module: PipelineModule,
    options: PipelineOptions,
    stages: Sequence[range],
    size: int,
    precision: Precision = Precision(),
) -> list[RankEstimate]:
    """What each rank holds, without activations and FLOPs.

    Args:
        module: a module on the meta device.
        options, stages: what `training.runner.resolve_options` returns.
        size: the number of ranks of the pipeline, P.
        precision: the bytes of weights.
    """
    stage_rank, made = options.stage_rank(size), list[RankEstimate]()
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
        made.append(RankEstimate(layers, _count(own), count, share, static + precision.static(module.llm, own)))
    return made


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _replicated(module: PipelineModule) -> list[Encoder | Generator]:
    found = [*module.encoders.values(), *module.generators.values()]
    return [component for component in found if isinstance(component, Encoder | Generator)]
