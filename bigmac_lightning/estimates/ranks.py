"""What each rank of a pipeline holds: its layers, its parameters, and the memory that these take from start to end.

If a rank consists of several processes, the estimates are those of its first process, which has the most.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
from bigmac_lightning.contracts.module import Part, PipelineModule
from bigmac_lightning.runtime.sharding import blocks_of
from bigmac_lightning.training.options import MANY_MICROBATCHES, PipelineOptions
from bigmac_lightning.training.stages import part_of

Component = Encoder | LanguageModel | Generator


Alike = Mapping[tuple[torch.Size, int, int, bool], int]
"""Numbers of weights by their shape, slices, bytes of a number, and whether they are trained."""


@dataclass(frozen=True)
class Precision:
    """The bytes that a number takes.

    Attributes:
        weights: bytes of a weight; ``None``: as many as the weights of the module have.
        activations: bytes of a number that is saved for the backward; ``None``: as many as a weight of the LLM.
        many: gradients of 16-bit weights are summed in float32 if a batch has more microbatches than this.
    """

    weights: int | None = None
    activations: int | None = None
    many: float = MANY_MICROBATCHES

    @classmethod
    def of(cls, name: str | int | None, float32_gradients: bool | None = None, batches: int = 1) -> "Precision":
        """The precision of Lightning with a name such as "bf16-mixed".

        Args:
            float32_gradients: see `BigMacStrategy`.
            batches: number of batches in an optimizer step.
        """
        text = str(name or "32-true")
        size = 2 if "16" in text or "transformer-engine" in text else 8 if "64" in text else None
        many = {None: MANY_MICROBATCHES / batches, True: 0.0, False: math.inf}[float32_gradients]
        return cls(size if text.endswith("-true") or text == "64" else None, size, many)

    def size(self, component: Component, parameter: nn.Parameter) -> int:
        """The bytes of a number of a component's weight."""
        return self.weights or (component.dtype.itemsize if component.dtype else parameter.element_size())

    def static(
        self,
        component: Component,
        parameters: Iterable[nn.Parameter],
        rank: int = 0,
        shards: int = 1,
        slices: Mapping[nn.Parameter, int] = MappingProxyType({}),
        master: bool = False,
    ) -> int:
        """The bytes of a rank's shards of these weights of a component. A trained weight has a gradient and AdamW's two
        moments besides, so it counts four times.

        Args:
            rank: which shard the rank has.
            shards: number of shards, into which the rows of a weight are divided; 1: the weights are whole.
            slices: into how many slices a weight is divided besides.
            master: whether shards are float32 whatever type the model computes in.
        """
        return static_of(self.alike(component, parameters, slices, master), rank, shards)

    def widening(
        self,
        component: Component,
        parameters: Iterable[nn.Parameter],
        slices: Mapping[nn.Parameter, int] = MappingProxyType({}),
    ) -> int:
        """The bytes by which gradients of these weights are larger if they are summed in float32."""
        trained = ((p, self.size(component, p)) for p in parameters if p.requires_grad)
        return sum(p.numel() // slices.get(p, 1) * max(4 - size, 0) for p, size in trained)

    def alike(
        self,
        component: Component,
        parameters: Iterable[nn.Parameter],
        slices: Mapping[nn.Parameter, int] = MappingProxyType({}),
        master: bool = False,
    ) -> Alike:
        """How many of these weights are of the same shape, slices, size of a number, and trained or not."""
        return Counter(
            (p.shape, slices.get(p, 1), 4 if master else self.size(component, p), p.requires_grad) for p in parameters
        )

    def whole(
        self,
        component: Component,
        parameters: Iterable[nn.Parameter],
        gradients: bool = True,
        master: bool = False,
        slices: Mapping[nn.Parameter, int] = MappingProxyType({}),
    ) -> int:
        """The bytes of whole weights of a component, or of a tensor peer's slices, while they are gathered, and of
        their gradients."""
        return sum(
            p.numel() // slices.get(p, 1) * (size + (gradients and p.requires_grad) * (4 if master else size))
            for p, size in ((p, self.size(component, p)) for p in parameters)
        )

    def gathered(self, component: Component, kind: str, master: bool = False) -> int:
        """The bytes of whole weights and gradients that exist at the same time if a component lies in shards.

        Args:
            kind: "zero1": those of the whole component; "fsdp": those of the largest block and of what lies in no
                block, with the weights of the block that runs next.
            master: whether shards, and so all gradients, are float32.
        """

        bytes_of = partial(self.whole, component, master=master)
        if kind == "zero1":
            return bytes_of(component.parameters())
        return _by_block(bytes_of, component.parameters(), [list(b.parameters()) for b in blocks_of(component)])

    def gathered_stages(
        self,
        llm: LanguageModel,
        part: Part,
        kind: str,
        master: bool = False,
        slices: Mapping[nn.Parameter, int] = MappingProxyType({}),
    ) -> int:
        """Like `gathered`, of a rank's part of the LLM."""
        bytes_of, layers = partial(self.whole, llm, master=master, slices=slices), part.layers or ()
        own = list(llm.parameters_of(layers, part.embedding, part.head))
        if kind == "zero1":
            return bytes_of(own)
        return _by_block(bytes_of, own, [list(llm.parameters_of((k,), False, False)) for k in layers])


def static_of(alike: Alike, rank: int, shards: int) -> int:
    """The bytes of a rank's shards of weights, see `Precision.static`."""
    return sum(
        number * (_part(shape, rank, shards) // cut) * size * (4 if trained else 1)
        for (shape, cut, size, trained), number in alike.items()
    )


def _by_block(
    bytes_of: Callable[..., int], every: Iterable[nn.Parameter], blocks: Sequence[Sequence[nn.Parameter]]
) -> int:
    inside = {id(parameter) for block in blocks for parameter in block}
    largest = max(blocks, key=bytes_of, default=[])
    beside = [parameter for parameter in every if id(parameter) not in inside]
    return bytes_of(beside) + bytes_of(largest) + bytes_of(largest, gradients=False)


@dataclass(frozen=True)
class RankEstimate:
    """What a rank holds, computes and needs; or, if it consists of several processes, one of them.

    Attributes:
        layers: the layers of each of its stages.
        llm: the number of parameters of its part of the LLM, slices and not shards of them.
        replicated: the number of parameters of encoders and generators, which every rank has.
        share: its share of the LLM's time.
        static: bytes of weights, gradients and AdamW's two moments, as far as this rank has them on its device between
            steps.
        offloaded: bytes of the same in the CPU's memory.
        gathered: bytes of the further weights and gradients that a rank has at a time while it computes, of components
            that lie in shards.
        widening: further bytes of gradients if those of 16-bit weights are summed in float32.
        activations: bytes at the peak, by "LLM", "encoder", "generator" and "logits"; empty: not estimated.
        tflop: TFLOP in a step.
    """

    layers: tuple[range, ...]
    llm: int
    replicated: int
    share: float
    static: int = 0
    offloaded: int = 0
    gathered: int = 0
    activations: dict[str, float] = field(default_factory=dict)
    tflop: float = 0.0
    widening: int = 0

    def summing(self, precision: Precision, microbatches: int) -> "RankEstimate":
        """The same in a step with so many microbatches: `static` then has gradients as they are summed."""
        wide = self.widening if microbatches > precision.many else 0
        return replace(self, static=self.static + wide, widening=0)

    @property
    def memory(self) -> float:
        """Bytes of everything on the device together. That is an upper bound, as the peaks need not come at the same
        time."""
        return self.static + self.gathered + sum(self.activations.values())


def ranks_of(
    module: PipelineModule,
    options: PipelineOptions,
    stages: Sequence[range],
    size: int,
    precision: Precision = Precision(),
    replicas: int = 1,
) -> list[RankEstimate]:
    """What each rank of the first pipeline holds, without activations and FLOPs.

    Args:
        module: a module on the meta device.
        options, stages: what `training.stages.resolve_options` returns.
        size: the number of ranks of the pipeline, P.
        precision: the bytes of weights.
        replicas: the number of pipelines.
    """
    sharding = options.sharding
    stage_rank, made, masters = options.stage_rank(size), list[RankEstimate](), sharding.master_weights
    peers, slices = options.parallel.peers, module.llm.slices(options.parallel)
    replicated = _replicated(module)
    weights = {name: list(component.parameters()) for name, component in replicated}
    count, gathered, widening, alike = sum(map(_count, weights.values())), 0, 0, dict[str, Alike]()
    for name, component in replicated:
        kind = sharding.of_component(name)
        master = masters and kind != "ddp"
        apart = master or sharding.offloads(name) or _shards(kind, size * peers, replicas) > 1
        if apart:
            gathered += precision.gathered(component, kind, master)
        else:
            widening += precision.widening(component, weights[name])
        alike[name] = precision.alike(component, weights[name], master=master)
    times = module.trained_layers.step(module.llm.costs(options.sample_tokens))
    whole = sum(times.of(stage) for stage in stages)
    for rank in range(size):
        part = part_of(rank, stages, stage_rank)
        own = list(module.llm.parameters_of(part.layers or (), part.embedding, part.head))
        layers = tuple(stages[s] for s, owner in enumerate(stage_rank) if owner == rank)
        share = sum(times.of(stage) for stage in layers) / whole
        kind, shards = sharding.stages, replicas * options.parallel.context
        master, offload = masters and kind != "ddp", sharding.offloads("llm")
        bytes_of = {"llm": precision.static(module.llm, own, 0, shards if kind != "ddp" else 1, slices, master)}
        whole_stages, wide = 0, 0
        if master or offload or (kind != "ddp" and shards > 1):
            whole_stages = precision.gathered_stages(module.llm, part, kind, master, slices)
        else:
            wide = precision.widening(module.llm, own, slices)
        for name in alike:
            kind = sharding.of_component(name)
            bytes_of[name] = static_of(alike[name], rank * peers, _shards(kind, size * peers, replicas))
        offloaded = sum(size for name, size in bytes_of.items() if sharding.offloads(name))
        static = sum(bytes_of.values()) - offloaded
        llm = sum(parameter.numel() // slices.get(parameter, 1) for parameter in own)
        held = (layers, llm, count, share, static, offloaded, gathered + whole_stages)
        made.append(RankEstimate(*held, widening=widening + wide))
    return made


def _shards(kind: str, processes: int, replicas: int) -> int:
    """Into how many shards the weights of an encoder or a generator are cut, by so many processes of a pipeline."""
    return {"ddp": 1, "zero1": processes * replicas, "fsdp": processes}[kind]


def _part(shape: torch.Size, rank: int, shards: int) -> int:
    """How many numbers of a parameter are in a shard."""
    if shards == 1:
        return shape.numel()
    rows = shape[0]
    most = -(-rows // shards)
    return min(max(rows - rank * most, 0), most) * (shape.numel() // max(rows, 1))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _replicated(module: PipelineModule) -> list[tuple[str, Encoder | Generator]]:
    """Encoders and generators by name."""
    found = [(f"encoders.{name}", part) for name, part in module.encoders.items()]
    found += [(f"generators.{name}", part) for name, part in module.generators.items()]
    return [(name, part) for name, part in found if isinstance(part, Encoder | Generator)]
