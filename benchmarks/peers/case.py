"""The cases that peers are compared in, and the names of the peers.

Costs are relative to the forward of one rank's part of the LLM on one microbatch, which takes 1; its backward takes 2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from bigmac_lightning.schedule.costs import Costs

MICROBATCHES = 16
ITEMS, TARGETS = 4, 2
"""How many media items and generator targets a microbatch has, if devices sleep."""

DATA_PARALLEL = ("ddp", "fsdp2")
PIPELINING = ("torch_1f1b", "torch_interleaved")
POLICIES = ("first_stage", "disaggregated", "upfront", "recompute", "nested", "filled")
INTERLEAVED = "filled_interleaved"
MEASURING = "filled_auto"
PEERS = (*DATA_PARALLEL, *PIPELINING, *POLICIES, INTERLEAVED, MEASURING)

LABELS = {
    "ddp": "Lightning DDP",
    "fsdp2": "Lightning FSDP2",
    "torch_1f1b": "torch pipelining, 1F1B, encoder in stage 0",
    "torch_interleaved": "torch pipelining, interleaved 1F1B, encoder in stage 0",
    "first_stage": "first_stage (Megatron)",
    "disaggregated": "disaggregated (DistTrain)",
    "upfront": "upfront (Optimus, LoongForge)",
    "recompute": "recompute (Kimi)",
    "nested": "nested (BigMac)",
    "filled": "filled",
    "filled_interleaved": "filled, interleaved 1F1B",
    "filled_auto": "filled, measured costs",
}
"""How tables name the peers."""

ENCODERS, GENERATORS, SIGMAS = (0.1, 0.3, 1.0, 4.0), (0.0, 1.0, 3.0, 9.0), (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Case:
    """What all peers of a comparison run.

    Attributes:
        regime: whether layers compute, or sleep as long as a device would compute.
        size: number of processes, P.
        microbatches: number of microbatches in a step, M; a multiple of P.
        encoder: forward time of a mean microbatch's encoder work on one rank.
        generator: forward and backward time of a microbatch's generator work on one rank; 0: there is no generator.
        sigma: of the lognormal distribution of the times of media items and targets, if devices sleep. Layers that
            compute have 1 to 4 images in a microbatch instead.
        seed: of the data.
    """

    regime: Literal["sleep", "compute"]
    size: int
    microbatches: int
    encoder: float
    generator: float
    sigma: float
    seed: int = 0

    @property
    def costs(self) -> Costs:
        """The times of actions, as a plan takes them."""
        return Costs(F=1, B=2, EF=self.encoder, EB=2 * self.encoder, G=self.generator)

    @property
    def ideal(self) -> float:
        """How long a step takes with bare 1F1B and all other work spread over the ranks."""
        nested = self.microbatches / self.size * (3 * self.encoder + self.generator)
        return 3 * (self.microbatches + self.size - 1) + nested

    @property
    def peers(self) -> tuple[str, ...]:
        """The peers that run it. Where layers sleep, FSDP2 would only show how long gloo takes to gather tiny weights;
        and a training that measures its costs needs many steps."""
        return tuple(peer for peer in PEERS if self.regime == "compute" or peer not in ("fsdp2", MEASURING))


def sleeping_cases(sizes: Sequence[int] = (4, 8)) -> Iterator[Case]:
    """All of the grid."""
    for seed, values in enumerate(product(sizes, ENCODERS, GENERATORS, SIGMAS)):
        size, encoder, generator, sigma = values
        yield Case("sleep", size, MICROBATCHES, encoder, generator, sigma, seed)


def default_cases(sizes: Sequence[int] = (4, 8)) -> Iterator[Case]:
    """With P = 4 the grid with the least and the largest sigma; with larger P a third of it, in which each pair of
    values occurs."""
    for case in sleeping_cases(sizes):
        third = (ENCODERS.index(case.encoder) + GENERATORS.index(case.generator)) % len(SIGMAS)
        if case.sigma != 0.5 if case.size <= 4 else case.sigma == SIGMAS[third]:
            yield case


def quick_cases() -> Iterator[Case]:
    """Corners of the grid, and cases inside."""
    chosen = [
        (4, 0.1, 0.0, 0.0),
        (4, 0.1, 9.0, 0.0),
        (4, 0.3, 1.0, 0.5),
        (4, 1.0, 3.0, 0.5),
        (4, 4.0, 0.0, 1.0),
        (4, 4.0, 9.0, 1.0),
        (8, 0.3, 1.0, 0.5),
        (8, 1.0, 3.0, 1.0),
    ]
    for seed, (size, encoder, generator, sigma) in enumerate(chosen):
        yield Case("sleep", size, MICROBATCHES, encoder, generator, sigma, seed)
