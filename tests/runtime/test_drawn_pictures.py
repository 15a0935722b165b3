"""LLMs that draw in their layers, with random options at once, against one process: losses, gradients, drawings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.models import LatentCodec, UnifiedLM
from bigmac_lightning.models.unified.shared_latents import Latents
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of, peers_of
from tests.models.test_unified import DROPOUT, LAYERS, SIDE, batch, load, module
from tests.ranks import run_ranks
from tests.runtime.matrix import whole
from tests.runtime.test_families import error
from tests.toy import split_layers

FREEZE = [(), ("llm",), ("encoders",), ("generators",), ("llm.*drawn*",), ("llm.*others*",), ("llm.*embed_tokens*",)]

PICTURES = 4
"""Of the batch."""


class Case(NamedTuple):
    """One combination."""

    frozen: tuple[str, ...]
    backbone: Any
    policy: Any
    shards: dict[str, Any]
    packed: bool
    recomputes: bool
    codec: bool
    dropout: float
    guidance: float


def drawn(random: Random) -> Case:
    frozen = random.choice([*FREEZE, (*random.choice(FREEZE), *random.choice(FREEZE))])
    backbone = random.choice(["1f1b", "gpipe", "interleaved_1f1b", "zb1p"])
    shards = {kind: random.choice(["ddp", "zero1", "fsdp"]) for kind in ("encoders", "generators")}
    switches = [random.random() < 0.5 for _ in range(3)]
    dropout = random.choice([0.0, DROPOUT])
    policy = random.choice(["nested", "filled", "upfront", "recompute"])
    return Case(frozen, backbone, policy, shards, *switches, dropout, random.choice([1.0, 3.0]) if dropout else 1.0)


def made(case: Case) -> UnifiedLM:
    options = {"condition_dropout": case.dropout, "guidance_scale": case.guidance}
    return module(case.codec, case.frozen, case.recomputes, **options)


def given(case: Case, layout: PipelineLayout, data: bool = True) -> Batch:
    return batch(layout, 2 * SIDE if case.codec else SIDE, data, case.packed)


def drawings(unified: UnifiedLM, case: Case, layout: PipelineLayout) -> list[Tensor]:
    with torch.no_grad():
        found = unified.eval().pipeline(given(case, layout, data=False), sample=True).samples
    assert found is not None
    return found


class Encoded:
    """Counts pictures that codecs encode, and latents that wait for a loss.

    Attributes:
        pictures: how often one was encoded.
        waiting, most: how many latents wait, now and at most.
    """

    def __init__(self) -> None:
        self.pictures, self.waiting, self.most = 0, 0, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        encode, give, take = LatentCodec.encode, Latents.give, Latents.take

        def counting(codec: LatentCodec, pictures: Tensor) -> Tensor:
            self.pictures += bool(pictures.any())  # those of ranks without work are zeros
            return encode(codec, pictures)

        def given(latents: Latents, made: Tensor) -> None:
            give(latents, made)
            self.waiting += latents._made is not None
            self.most = max(self.most, self.waiting)

        def taken(latents: Latents) -> Tensor | None:
            self.waiting -= latents._made is not None
            return take(latents)

        with pytest.MonkeyPatch.context() as patch:
            for of, name, instead in (
                (LatentCodec, "encode", counting),
                (Latents, "give", given),
                (Latents, "take", taken),
            ):
                patch.setattr(of, name, instead)
            yield


Result = tuple[float, dict[str, Tensor | None], list[Tensor], int]


def _ranks(rank: int, size: int, cases: list[Case], tensor: int) -> list[Result]:
    found = []
    for case in cases:
        several = 2 if case.backbone == "interleaved_1f1b" else 1
        rank_of = [stage % size for stage in range(size * several)]
        mesh, unified = build_mesh(torch.device("cpu"), 1, size, rank_of, tp=tensor), made(case)
        own, peers = split_layers(LAYERS, size * several), peers_of(mesh, ParallelSizes(tensor))
        unified.part = replace(part_of(mesh.pp_rank, own, rank_of), peers=peers)
        load(unified, case.codec)
        schedule = ScheduleOptions(case.policy, group_size=1, backbone=case.backbone, virtual_stages=several)
        unified.runner = PipelineRunner(
            unified, mesh, PipelineOptions(schedule, sharding=ShardingOptions(**case.shards))
        )
        layout, encoded = unified.runner.layout, Encoded()
        with encoded.counted():
            out = unified.pipeline(given(case, layout))
        assert not encoded.waiting
        reduce_gradients(unified.runner.places, mesh)
        gradients = {name: whole(p.grad) for name, p in unified.named_parameters() if p.requires_grad}
        found.append((out.loss.item(), gradients, drawings(unified, case, layout), encoded.pictures))
    return found


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.wide) for seed in range(1, 9))])
def test_random_options(seed: int, tensor: int) -> None:
    """Also with two tensor peers of each rank."""
    random = Random(seed)
    cases = [drawn(random) for _ in range(12 if seed else 3 // tensor)]
    ranks = run_ranks(2 * tensor, _ranks, 2, cases, tensor)
    for number, case in enumerate(cases):
        alone, once = load(made(case), case.codec), Encoded()
        with once.counted():
            out = alone.pipeline(given(case, PipelineLayout()))
        assert once.pictures == PICTURES * case.codec
        out.loss.backward()
        expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
        tied = {f"llm.{copy}": f"llm.{original}" for copy, original in alone.llm.tied.items()}
        pictures = drawings(alone, case, PipelineLayout())
        # an action that runs again encodes again, and ranks that gather a codec's weights together run it equally often
        again = case.policy == "recompute" and "encoders" not in case.frozen
        times = case.codec * (1 + again + (case.shards["generators"] == "fsdp"))
        assert sum(rank[number][-1] for rank in ranks) == PICTURES * times, case
        for loss, gradients, found, _ in (rank[number] for rank in ranks):
            assert loss == pytest.approx(out.loss.item(), rel=1e-6), case
            for name, gradient in gradients.items():
                wrong = error(gradient, expected[tied.get(name, name)], expected)
                assert wrong < 1e-5, f"{case}: {name}: {wrong:.1e}"
            for one, other in zip(found, pictures, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda m, case=case: f"{case}: {m}")


def _many(rank: int, size: int, policies: list[Any]) -> list[Encoded]:
    """A longer batch."""
    mesh, found = build_mesh(torch.device("cpu"), 1, size, range(size)), list[Encoded]()
    for policy in policies:
        unified = module(codec=True)
        unified.part = part_of(rank, split_layers(LAYERS, size), range(size))
        load(unified, codec=True)
        unified.runner = PipelineRunner(unified, mesh, PipelineOptions(ScheduleOptions(policy, group_size=1)))
        microbatches = [one for _ in range(6) for one in batch(patch=2 * SIDE).microbatches]
        assign_owners(microbatches, unified.runner.layout)
        found.append(Encoded())
        with found[-1].counted():
            unified.pipeline(Batch(microbatches, unified.runner.layout))
    return found


def test_latents_do_not_gather() -> None:
    """However many microbatches there are, latents of a few wait for their losses."""
    for nested, again in run_ranks(2, _many, 2, ["nested", "recompute"]):
        assert (nested.pictures, again.pictures) == (3 * PICTURES, 6 * PICTURES)
        assert nested.most <= 3
        assert not nested.waiting
        assert not again.waiting
