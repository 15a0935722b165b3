"""What is compared: layouts of processes and shards, with models of which some parts are trained."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from random import Random
from typing import Any

from bigmac_lightning import ShardingOptions
from tests.training.trainers import strategy_of

MESHES = (
    (1, 2, 1, 1),
    (2, 2, 1, 1),
    (1, 2, 1, 2),
    (1, 2, 2, 1),
    (1, 2, 2, 2),
    (2, 2, 1, 2),
    (2, 1, 2, 1),
    (1, 1, 1, 2),
)
"""Sizes (dp, pp, cp, tp)."""
MICROBATCHES = 3
SHARDED = ("ddp", "zero1", "fsdp")
SCHEDULES: dict[str, dict[str, Any]] = {
    "nested, 1f1b": {"group_size": 2},
    "filled, zb1p": {"policy": "filled", "backbone": "zb1p", "group_size": 1},
    "recompute, 1f1b": {"policy": "recompute"},
    "first_stage, 1f1b": {"policy": "first_stage"},
    "nested, zbv": {"backbone": "zbv", "virtual_stages": 2},
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "mesh": MESHES,
    "decoder": ("dense", "tied", "experts", "spread experts", "qwen3_vl"),
    "encoders": SHARDED,
    "generators": ("none", *SHARDED),
    "stages": SHARDED,
    "schedule": tuple(SCHEDULES),
    "frozen": ("nothing", "encoders, layer 0", "LLM", "LLM but adapters"),
}


@dataclass(frozen=True)
class Case:
    """One value of each factor.

    Attributes:
        mesh: sizes (dp, pp, cp, tp).
        decoder: "spread experts" are spread over the tensor peers; "qwen3_vl" has deepstack, packed rows, M-RoPE and
            tied embeddings.
        encoders, generators, stages: how each is sharded; "none": there are no generators.
        schedule: policy and backbone.
        frozen: what is not trained.
        offload: whether all shards are on the CPU.
    """

    mesh: tuple[int, int, int, int] = (1, 2, 1, 1)
    decoder: str = "dense"
    encoders: str = "ddp"
    generators: str = "ddp"
    stages: str = "ddp"
    schedule: str = "nested, 1f1b"
    frozen: str = "nothing"
    offload: bool = False

    @property
    def world(self) -> int:
        dp, pp, cp, tp = self.mesh
        return dp * pp * cp * tp

    def strategy_arguments(self) -> dict[str, Any]:
        dp, pp, cp, tp = self.mesh
        generators: Any = "ddp" if self.generators == "none" else self.generators
        kinds: Any = (self.encoders, generators, self.stages)
        names = ("encoders", "generators", "stages")
        offload: Any = tuple(name for name, kind in zip(names, kinds, strict=True) if kind != "ddp" and self.offload)
        return {
            "data_parallel_size": dp,
            "pipeline_parallel_size": pp,
            "context_parallel_size": cp,
            "tensor_parallel_size": tp,
            "expert_parallel_size": tp if self.decoder == "spread experts" else 1,
            "sharding": ShardingOptions(*kinds, offload=offload),
            "microbatches": MICROBATCHES if self.stages == "fsdp" else None,
            **SCHEDULES[self.schedule],
        }

    @property
    def refusal(self) -> str:
        """Why the strategy refuses the case; empty if it does not."""
        return _refusal(replace(self, decoder="dense", frozen="nothing"))

    @property
    def is_new(self) -> bool:
        """Whether it is no other case under another name: experts can be spread over several tensor peers only."""
        return self.decoder != "spread experts" or self.mesh[3] > 1

    @property
    def in_one_process(self) -> "Case":
        """The same model and batches, without what does not matter there."""
        generators = "none" if self.generators == "none" else "ddp"
        decoder = self.decoder.removeprefix("spread ")
        return Case((self.mesh[0], 1, 1, 1), decoder, generators=generators, frozen=self.frozen)

    def pairs(self) -> set[tuple[str, Any, str, Any]]:
        """The values of each two of the factors."""
        return {(a, getattr(self, a), b, getattr(self, b)) for a, b in combinations(FACTORS, 2)}

    def __str__(self) -> str:
        return " | ".join(self.columns())

    def columns(self) -> list[str]:
        """What the table says of it."""
        sizes = ", ".join(map(str, self.mesh))
        return [f"({sizes})", *(getattr(self, name) for name in FACTORS if name != "mesh")]


@cache
def _refusal(case: Case) -> str:
    try:
        strategy_of(**case.strategy_arguments())
    except ValueError as error:
        return str(error)
    return ""


def cases(seed: int = 9) -> list[Case]:
    """Cases that together have each pair of values of two factors: first those that run, then refused ones for pairs
    that no other case can have. Each one is the best of some drawn ones for a pair that is still missing."""
    random = Random(seed)
    names = list(FACTORS)
    pairs = [(a, x, b, y) for a, b in combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]]
    missing, found, without = set(pairs), list[Case](), list[tuple[str, Any, str, Any]]()
    for pair in sorted(pairs, key=lambda _: random.random()):
        if pair not in missing:
            continue
        drawn = [case for case in _drawn(random, pair) if not case.refusal]
        if not drawn:
            without.append(pair)
            continue
        best = max(drawn, key=lambda case: len(case.pairs() & missing))
        missing -= best.pairs()
        found.append(best)
    return [*sorted(found, key=_order), *_refused(without)]


def narrow(number: int = 6) -> list[Case]:
    """Some of them, for every day: ranks of several processes, with as many values of factors as so many can have."""
    peers, chosen, seen = [c for c in cases() if c.mesh[2:] != (1, 1) and not c.refusal], list[Case](), set[Any]()

    def new(case: Case) -> int:
        return len({(name, getattr(case, name)) for name in FACTORS} - seen)

    for _ in range(number):
        best = max(peers, key=lambda case: (new(case), -case.world))
        chosen.append(best)
        seen |= {(name, getattr(best, name)) for name in FACTORS}
    return chosen


def _drawn(random: Random, pair: tuple[str, Any, str, Any], number: int = 60) -> Iterator[Case]:
    a, x, b, y = pair
    for _ in range(number):
        case = replace(Case(**{name: random.choice(values) for name, values in FACTORS.items()}), **{a: x, b: y})
        if case.is_new:
            yield case


def _refused(pairs: list[tuple[str, Any, str, Any]]) -> Iterator[Case]:
    for a, x, b, y in pairs:
        case = replace(Case(), **{a: x, b: y})
        case = case if case.is_new or "mesh" in (a, b) else replace(case, mesh=(1, 2, 1, 2))
        if case.is_new:
            assert case.refusal, case
            yield case


def _order(case: Case) -> tuple[int, ...]:
    return MESHES.index(case.mesh), *(FACTORS[name].index(getattr(case, name)) for name in FACTORS if name != "mesh")
