"""A model whose layers sleep as long as a device would compute, with small real weights and messages.

So losses and gradients are real, and can be compared; and as sleeping devices overlap, eight of them need no more than
two cores. Weights take no time to send: what data-parallel training spends on gradients of real size is not in its step
time.
"""

import statistics
import time
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.case import Case
from bigmac_lightning.contracts.batch import TargetItem
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel

WIDTH, VOCABULARY = 32, 32
LAYERS_PER_RANK = 2


class Device:
    """The sleeping device of this process: how fast it is, and what it has done.

    Attributes:
        unit: seconds of the forward of one rank's part of the LLM.
        late: by how many seconds a sleep is too long, usually.
        busy: seconds it has slept.
        live, peak: activations alive, now and at most, by the forward time of the layers that made them.
    """

    unit = 0.0
    late = 0.0
    busy = 0.0
    live = 0.0
    peak = 0.0

    @classmethod
    def run(cls, cost: float) -> None:
        """Be busy for a time of `cost` units."""
        seconds = cost * cls.unit
        cls.busy += seconds
        time.sleep(max(0.0, seconds - cls.late))

    @classmethod
    def save(cls, cost: float) -> None:
        """Save the activations of layers with this forward time; or free them, if it is negative."""
        cls.live += cost
        cls.peak = max(cls.peak, cls.live)

    @classmethod
    def calibrate(cls) -> None:
        """Find out how late sleeps are."""
        late = list[float]()
        for _ in range(20):
            start = time.perf_counter()
            time.sleep(0.005)
            late.append(time.perf_counter() - start - 0.005)
        cls.late = statistics.median(late)


class _Sleep(torch.autograd.Function):
    """Sleeps for `cost` units, and twice as long in the backward, until which activations are alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cost: float) -> Tensor:
        ctx.cost = cost
        Device.run(cost)
        if ctx.needs_input_grad[0]:
            Device.save(cost)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        Device.run(2 * ctx.cost)
        Device.save(-ctx.cost)
        return gradient, None


class Block(nn.Module):
    """Sleeps, and multiplies by a real weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cost: float) -> Tensor:
        return _Sleep.apply(x + 0.1 * torch.tanh(self.linear(x)), cost)  # pyright: ignore[reportReturnType]


class SleepingEncoder(Encoder):
    """Sleeps for the sum of its items' costs, which are the first numbers of their pixels."""

    width = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(1000)

    def forward(self, pixels: list[Tensor]) -> Tensor:
        return self.block(torch.cat([item[:, 1:] for item in pixels]), sum(float(item[0, 0]) for item in pixels))


class SleepingGenerator(Generator):
    """Sleeps for the sum of its items' costs, of which a third is the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(2000)

    def forward(self, conditions: list[Tensor], items: list[TargetItem]) -> Tensor:
        made = self.block(torch.cat(conditions), sum(item.cost for item in items) / 3)
        return made.square().mean(1).sum() / items[0].rows

    def sample(self, conditions: list[Tensor], items: list[TargetItem]) -> list[Tensor]:
        raise NotImplementedError


class SleepingLLM(LanguageModel):
    """Layers that take a unit together on each rank."""

    width, tied, vocabulary = WIDTH, {}, VOCABULARY

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.num_layers = layers

    def materialize(self, layers: Collection[int], embedding: bool, head: bool, peers: Any = None) -> None:
        self.layers = nn.ModuleDict({str(k): Block(k) for k in sorted(layers)})
        with torch.random.fork_rng():
            torch.manual_seed(3000)
            self.embedding = nn.Embedding(VOCABULARY, WIDTH) if embedding else None
            torch.manual_seed(4000)
            self.head = nn.Linear(WIDTH, VOCABULARY) if head else None

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        assert self.embedding is not None
        return self.embedding(inputs["input_ids"])

    def run_layers(self, h_BSD: Tensor, inputs: dict[str, Tensor], layers: range, extras: dict[str, Tensor]) -> Tensor:
        for k in layers:
            h_BSD = self.layers[str(k)](h_BSD, 1 / LAYERS_PER_RANK)
        return h_BSD

    def logits(self, h_LD: Tensor) -> Tensor:
        assert self.head is not None
        return self.head(h_LD)


def sleeping_parts(case: Case) -> tuple[SleepingLLM, dict[str, Encoder], dict[str, Generator]]:
    """The components of a case's model, in which each rank has two layers."""
    generators: dict[str, Generator] = {"drawing": SleepingGenerator()} if case.generator else {}
    return SleepingLLM(LAYERS_PER_RANK * case.size), {"image": SleepingEncoder()}, generators
