"""Random combinations of what may be frozen, what microbatches may be, and how they may be planned, against plain
autograd in one process: ``python -m tests.runtime.matrix --cases 2000 --seed 1`` runs many, the suite a few.

Each case takes a few steps; before each of them something else is frozen or unfrozen.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import Batch, Microbatch, PipelineLayout
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.models.lora import add_lora
from bigmac_lightning.runtime.gradients import global_norm
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.runtime.sharding import whole_of
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.offloading import to_device
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import ToyModule, seeded, split_layers, toy_batch

TOLERANCE = 1e-6
STEPS = 3
BACKBONES = {
    "1f1b": (1,),
    "gpipe": (1,),
    "zb1p": (1,),
    "interleaved_1f1b": (2, 3),
    "looped_bfs": (2, 3),
    "zbv": (2,),
    "dualpipev": (2,),
}
POLICIES = ("nested", "filled", "upfront", "recompute", "first_stage", "disaggregated")
NUMBERS = (1, 2, 3, 4, 5, 7)
SPLITTING = ("zb1p", "zbv", "dualpipev")
KINDS = ("all", "all", "text", "unlabelled", "targets", "media", "nothing")


@dataclass(frozen=True)
class Case:
    """One combination.

    Attributes:
        adapters: linear layers that have low-rank adapters, by component; of such components nothing else is trained.
        frozen: beginnings of the names of what is not trained, for each step.
        kinds: of each step's microbatches of each replica.
    """

    seed: int
    pp: int
    dp: int
    options: PipelineOptions
    layers: int
    tied: bool
    checkpointed: tuple[int, ...]
    adapters: tuple[tuple[str, frozenset[str]], ...]
    frozen: tuple[tuple[str, ...], ...]
    kinds: tuple[tuple[tuple[str, ...], ...], ...]
    owner_costs: bool

    def module(self) -> PipelineModule:
        return AdaptedModule(self.layers, self.tied, self.checkpointed, dict(self.adapters))

    def batch(self, step: int, replica: int, layout: PipelineLayout) -> Batch:
        kinds = self.kinds[step][replica]
        batch = toy_batch(len(kinds), layout, seed=100 * self.seed + 10 * step + replica, costs=self.owner_costs)
        return batch.replace(microbatches=[_as(kind, m) for kind, m in zip(kinds, batch.microbatches, strict=True)])


def _as(kind: str, microbatch: Microbatch) -> Microbatch:
    nothing = torch.empty(0, dtype=torch.long)
    without: dict[str, dict[str, Any]] = {
        "labels": {"labels": nothing, "label_positions": nothing},
        "media": {"media": [], "media_positions": nothing},
        "targets": {"targets": [], "target_positions": nothing},
    }
    left_out = {
        "all": (),
        "text": ("media", "targets"),
        "unlabelled": ("labels",),
        "targets": ("labels", "media"),
        "media": ("targets",),
        "nothing": ("labels", "targets"),
    }[kind]
    changes: dict[str, Any] = {}
    for part in left_out:
        changes |= without[part]
    return replace(microbatch, **changes)


class AdaptedModule(ToyModule):
    """With adapters that already do something: each gradient is more than zero."""

    def __init__(
        self, layers: int, tied: bool, checkpointed: Collection[int], adapters: Mapping[str, Collection[str]]
    ) -> None:
        super().__init__(layers, tied, checkpointed=checkpointed)
        self.adapters = adapters

    def adapt(self) -> None:
        for name, targets in self.adapters.items():
            component = self.get_submodule(name)
            add_lora(component, name, {"r": 2, "target_modules": list(targets)}, targets)
            for path, parameter in component.named_parameters():
                if ".lora_B." in path:
                    seeded(path)
                    nn.init.normal_(parameter, std=0.1)


def draw(seed: int, pp: int, dp: int) -> Case:
    """The case of a seed."""
    random = Random(f"{seed}/{pp}/{dp}")
    backbone = random.choice(list(BACKBONES))
    virtual_stages = random.choice(BACKBONES[backbone])
    policy = random.choice([p for p in POLICIES if p != "disaggregated" or (pp == 3 and virtual_stages < 3)])
    options = PipelineOptions(
        ScheduleOptions(
            policy,
            backbone,
            random.choice([None, 1, 2, pp]),
            virtual_stages=virtual_stages,
            costs=random.choice(
                [Costs(G=3), Costs(EF=4, EB=8, G=1), Costs(EF=0, EB=0, G=0), Costs(F=3, B=5, I=2, W=3)]
            ),
            ramp=random.random() < 0.2,
            pieces=random.choice([1, 1, 3]),
        )
    )
    sharding = _offloaded(Random(f"{seed}/offload"), _sharding(random, options.schedule))
    options = replace(options, sharding=sharding)
    layers = max(4, pp * virtual_stages) + random.choice([0, 1])
    number = random.choice(NUMBERS) if options.sharding.stages == "fsdp" else None
    tied = random.random() < 0.4
    return Case(
        seed,
        pp,
        dp,
        options,
        layers,
        tied,
        tuple(k for k in range(layers) if random.random() < 0.15),
        _adapters(random, layers, tied) if random.random() < 0.3 else (),
        tuple(_frozen(random, layers, tied) for _ in range(STEPS)),
        tuple(tuple(_kinds(random, number) for _ in range(dp)) for _ in range(STEPS)),
        random.random() < 0.3,
    )


def _sharding(random: Random, schedule: ScheduleOptions) -> ShardingOptions:
    """Every second case has none."""
    if random.random() < 0.5:
        return ShardingOptions()
    spread = schedule.policy not in ("first_stage", "disaggregated")
    return ShardingOptions(
        encoders=random.choice(["ddp", "zero1", *["fsdp"] * (2 * (spread and schedule.pieces == 1))]),
        generators=random.choice(["ddp", "zero1", *["fsdp"] * (2 * spread)]),
        stages=random.choice(["ddp", "zero1", *["fsdp"] * (2 * (schedule.backbone not in SPLITTING))]),
    )


def _offloaded(random: Random, sharding: ShardingOptions) -> ShardingOptions:
    """With some of the shards on the CPU."""
    kinds = [kind for kind in ("encoders", "generators", "stages") if getattr(sharding, kind) != "ddp"]
    offload: Any = tuple(kind for kind in kinds if random.random() < 0.5)
    return replace(sharding, offload=offload)


def _adapters(random: Random, layers: int, tied: bool) -> tuple[tuple[str, frozenset[str]], ...]:
    """Of the LLM in all layers, in some, at an end, or the output layer; of towers, projectors and generators."""
    every = [f"layers.{k}.{name}" for k in range(layers) for name in ("mix", "up", "down")]
    llm = [
        every,
        [name for name in every if name.endswith("up")],
        [name for name in every if random.random() < 0.3],
        every[: 3 * random.randrange(1, layers)],
        every[3 * random.randrange(1, layers) :],
        ["head"],
        [*every, "head"],
    ]
    places = {
        "llm": random.choice(llm[: 5 if tied else None]),
        "encoders.image": random.choice([["tower.0", "tower.2"], ["projector"], ["tower.0"]]),
        "encoders.audio": ["tower.2", "projector"],
        "generators.drawing": random.choice([["net.0"], ["net.0", "net.2"]]),
    }
    chosen = random.sample(list(places), random.choice([1, 1, 2, 4]))
    return tuple((name, frozenset(places[name])) for name in places if name in chosen and places[name])


def _kinds(random: Random, number: int | None) -> tuple[str, ...]:
    number = number or random.choice(NUMBERS)
    if random.random() < 0.2:
        return (random.choice(KINDS),) * number
    return tuple(random.choice(KINDS) for _ in range(number))


def _frozen(random: Random, layers: int, tied: bool) -> tuple[str, ...]:
    """Of the components, none, parts or all."""
    encoders = [
        (),
        ("encoders",),
        ("encoders.image",),
        ("encoders.audio",),
        ("encoders.image.tower", "encoders.audio.tower"),
        ("encoders.image.tower", "encoders.audio"),
        ("encoders.image.projector", "encoders.audio.projector"),
    ]
    layer = [f"llm.layers.{k}" for k in range(layers)]
    ends = ("llm.embedding", "llm.head") if tied else ("llm.embedding",)
    cut = random.randrange(1, layers)
    llm = [
        (),
        ("llm",),
        (*ends, *layer[:cut]),  # the lower part
        (*layer[cut:], "llm.norm", "llm.head", *ends),  # the upper part
        (*layer, *ends),  # the final norm alone
        (*layer, "llm.norm", *(() if tied else ends)),  # the output weight alone
        (*layer, "llm.norm", "llm.head", *(ends if tied else ())),  # the embedding alone, if it can be
        tuple(name for name in layer if random.random() < 0.5),
        (*ends, *(name for name in layer if random.random() < 0.7), "llm.norm", "llm.head"),
    ]
    generators = [(), (), ("generators",), ("generators.drawing",)]
    return random.choice(encoders) + random.choice(llm) + random.choice(generators)


def freeze(module: PipelineModule, prefixes: Collection[str]) -> None:
    """As a callback would: whatever has such a name, under any of its names; and what has adapters."""
    aliases = list(module.named_parameters(remove_duplicate=False))
    adapted = tuple(f"{name}." for name in getattr(module, "adapters", ())) or "-"
    for name, parameter in aliases:
        parameter.requires_grad_("lora_" in name or not name.startswith(adapted))
    for name, parameter in aliases:
        if name.startswith(tuple(prefixes) or "-"):
            parameter.requires_grad_(False)


Result = tuple[float, float, dict[str, Tensor | None]]
"""Loss, norm of the gradients, gradients of what is trained."""


def reference(case: Case, device: str = "cpu") -> list[Result]:
    """The plain path in this process, over the batches of all replicas at once."""
    module = case.module()
    module.configure_model()
    module.to(device)
    results: list[Result] = []
    for step in range(STEPS):
        freeze(module, case.frozen[step])
        batches = [case.batch(step, replica, PipelineLayout()) for replica in range(case.dp)]
        batch = batches[0].replace(microbatches=[m for b in batches for m in b]).to(device)
        module.zero_grad(set_to_none=True)
        loss = module.pipeline(batch).loss
        loss.backward()
        gradients = {n: whole(p.grad) for n, p in module.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.get_total_norm([g for g in gradients.values() if g is not None])
        results.append((loss.item(), float(norm), gradients))
    return results


def pipelined(rank: int, todo: list[Case], device: str = "cpu") -> list[list[Result]]:
    """All cases on this rank."""
    meshes: dict[tuple[int, ...], Any] = {}
    found: list[list[Result]] = []
    for case in todo:
        try:
            found.append(_pipelined(case, meshes, torch.device(device)))
        except Exception as error:
            error.add_note(f"case {case}")
            raise
    return found


def _pipelined(case: Case, meshes: dict[tuple[int, ...], Any], device: torch.device) -> list[Result]:
    options = case.options.resolved(case.pp, case.layers, True, True)[0]
    stage_rank = tuple(options.stage_rank(case.pp))
    if stage_rank not in meshes:
        meshes[stage_rank] = build_mesh(device, case.dp, case.pp, stage_rank)
    mesh, module = meshes[stage_rank], case.module()
    module.part = part_of(mesh.pp_rank, split_layers(case.layers, len(stage_rank)), stage_rank)
    module.configure_model()
    to_device(module, device, options.sharding)
    freeze(module, case.frozen[-1])
    runner, results = PipelineRunner(module, mesh, options), list[Result]()
    for step in range(STEPS):
        freeze(module, case.frozen[step])
        runner.refresh()
        runner.sharding.forget_used()
        module.zero_grad(set_to_none=True)
        batch = move_data_to_device(case.batch(step, mesh.dp_rank, runner.layout), device)
        out = runner(batch, "train", reduce=True)
        for name, parameter in module.named_parameters():
            where = "cpu" if options.sharding.offloads(name) else device.type
            assert {tensor.device.type for tensor in (parameter, parameter.grad) if tensor is not None} == {where}, name
        gradients = {n: whole(p.grad) for n, p in module.named_parameters() if p.requires_grad}
        results.append((out.loss.item(), global_norm(runner.places, mesh).item(), gradients))
    return results


def whole(tensor: Tensor | None) -> Tensor | None:
    """The whole tensor that may lie in shards. Collective over the ranks that have shards of it."""
    return None if tensor is None else whole_of(tensor).cpu()


def differences(case: Case, expected: list[Result], by_rank: list[list[Result]]) -> Iterator[str]:
    """What is wrong with the results of all ranks."""
    for step, (loss, norm, gradients) in enumerate(expected):
        seen: set[str] = set()
        for rank, results in enumerate(by_rank):
            rank_loss, rank_norm, rank_gradients = results[step]
            for what, is_value, should in (("loss", rank_loss, loss), ("norm", rank_norm, norm)):
                if abs(is_value - should) > TOLERANCE * abs(should) + 1e-9:
                    yield f"step {step}, rank {rank}: {what} is {is_value}, not {should}"
            for name, gradient in rank_gradients.items():
                canonical = name if name in gradients else "llm.embedding.weight"
                seen.add(canonical)
                if canonical not in gradients:
                    yield f"step {step}, rank {rank}: {name} is trained"
                elif (gradients[canonical] is None) != (gradient is None):
                    yield f"step {step}, rank {rank}: {name} has {'no' if gradient is None else 'a'} gradient"
                elif gradient is not None:
                    should_be = gradients[canonical]
                    assert should_be is not None
                    error = (gradient - should_be).norm() / should_be.norm().clamp(min=1e-30)
                    if error > TOLERANCE and (gradient - should_be).abs().max() > 1e-9:
                        yield f"step {step}, rank {rank}: {name} is off by {error:.1e}"
        if missing := gradients.keys() - seen:
            yield f"step {step}: on no rank: {sorted(missing)}"


def cases(number: int, first: int = 0) -> list[Case]:
    """Cases for all sizes in turn."""
    sizes = list(itertools.product((1, 2, 3), (1, 2)))
    return [draw(first + i, *sizes[i % len(sizes)]) for i in range(number)]


def run(todo: list[Case]) -> dict[int, list[str]]:
    """What is wrong, by the seed of each case; cases of one world share their processes."""
    worlds: dict[tuple[int, int], list[Case]] = defaultdict(list)
    for case in todo:
        worlds[case.dp, case.pp].append(case)
    found: dict[int, list[str]] = {}
    for (dp, pp), some in worlds.items():
        by_rank = run_ranks(dp * pp, pipelined, some, timeout=60 + 10 * len(some))
        for i, case in enumerate(some):
            found[case.seed] = list(differences(case, reference(case), [results[i] for results in by_rank]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for first in range(arguments.seed, arguments.seed + arguments.cases, 120):
        todo = cases(min(120, arguments.seed + arguments.cases - first), first)
        for seed, problems in run(todo).items():
            wrong += bool(problems)
            for problem in problems[:3]:
                print(f"case {seed}: {problem}\n  {next(c for c in todo if c.seed == seed)}", flush=True)
        print(f"{first + len(todo) - arguments.seed} cases, {wrong} wrong", flush=True)


if __name__ == "__main__":
    main()
