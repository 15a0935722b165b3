"""Decoders whose layers hand on more than hidden states, or whose prompts see each other both ways, with random options
at once, against one process."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.models import MultimodalLM
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of, peers_of
from tests.models import more_families, zoo
from tests.ranks import run_ranks
from tests.runtime.matrix import whole
from tests.runtime.test_families import error
from tests.toy import split_layers

assert more_families.MORE  # which are then known to the zoo
FREEZE: dict[str, list[str]] = {
    "nothing": [],
    "LLM": ["llm"],
    "encoders": ["encoders"],
    "two layers": ["llm.*layers.0.*", "llm.*layers.1.*"],
    "embedding": ["llm.*embed_tokens*"],
    "encoders, embedding": ["encoders", "llm.*embed*"],
}
SIZES = [ParallelSizes(), ParallelSizes(tensor=2), ParallelSizes(context=2)]


class Case(NamedTuple):
    """One combination."""

    model: str
    packed: bool
    frozen: str
    backbone: Any
    shards: dict[str, Any]
    recomputes: bool
    sizes: ParallelSizes


def drawn(random: Random) -> Case:
    model = random.choice(["gemma4", "mllama", "paligemma", "gemma4_text", "gemma3n_text"])
    frozen, shards = random.choice(["nothing", "two layers", "embedding"]), random.choice(["ddp", "zero1", "fsdp"])
    recomputes, sizes = random.random() < 0.5, random.choice(SIZES)
    backbone = random.choice(["1f1b", "gpipe", "interleaved_1f1b"] + ["zb1p"] * (shards != "fsdp"))
    if model in ("gemma4", "mllama", "paligemma"):
        frozen, packed = random.choice(list(FREEZE)), zoo.KNOWN[model].packs and random.random() < 0.5
        return Case(model, packed, frozen, backbone, {"encoders": shards}, recomputes, sizes)
    return Case(model, random.random() < 0.5, frozen, backbone, {}, recomputes, sizes)


def made(case: Case, folder: Path) -> MultimodalLM:
    return MultimodalLM.from_pretrained(
        str(folder / case.model), freeze=FREEZE[case.frozen], gradient_checkpointing=case.recomputes
    )


def _ranks(rank: int, size: int, folder: Path, cases: list[Case]) -> list[tuple[float, dict[str, Tensor | None]]]:
    found = []
    for case in cases:
        module, several = made(case, folder), 2 if case.backbone == "interleaved_1f1b" else 1
        rank_of, sizes = [stage % size for stage in range(size * several)], case.sizes
        assert not module.llm.why_not_parallel(sizes)
        mesh = build_mesh(torch.device("cpu"), 1, size, rank_of, cp=sizes.context, tp=sizes.tensor)
        part = part_of(mesh.pp_rank, split_layers(zoo.LAYERS, size * several), rank_of)
        module.part = replace(part, peers=peers_of(mesh, sizes))
        module.configure_model()
        schedule = ScheduleOptions(group_size=1, backbone=case.backbone, virtual_stages=several)
        options = PipelineOptions(schedule, parallel=sizes, sharding=ShardingOptions(**case.shards))
        module.runner = PipelineRunner(module, mesh, options)
        out = module.pipeline(zoo.batch(zoo.KNOWN[case.model], case.packed, module.runner.layout))
        reduce_gradients(module.runner.places, mesh)
        found.append((out.loss.item(), {name: whole(p.grad) for name, p in module.named_parameters()}))
    return found


@pytest.mark.parametrize("seed", [66, *(pytest.param(seed, marks=pytest.mark.wide) for seed in range(1, 9))])
def test_random_options(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    cases = [drawn(random) for _ in range(4 if seed == 66 else 12)]
    for name in {case.model for case in cases}:
        zoo.save(name, tmp_path)
    for peers in {case.sizes.peers for case in cases}:
        _compare([case for case in cases if case.sizes.peers == peers], peers, tmp_path)


def _compare(cases: list[Case], peers: int, folder: Path) -> None:
    ranks = run_ranks(2 * peers, _ranks, 2, folder, cases)
    for number, case in enumerate(cases):
        module = made(case, folder)
        module.configure_model()
        out = module.pipeline(zoo.batch(zoo.KNOWN[case.model], case.packed, PipelineLayout()))
        out.loss.backward()
        expected = {name: parameter.grad for name, parameter in module.named_parameters()}
        tied = {f"llm.{copy}": f"llm.{original}" for copy, original in module.llm.tied.items()}
        for loss, gradients in (rank[number] for rank in ranks):
            assert loss == pytest.approx(out.loss.item(), rel=1e-6), case
            for name, gradient in gradients.items():
                wrong = error(gradient, expected[tied.get(name, name)], expected)
                assert wrong < 1e-5, f"{case}: {name}: {wrong:.1e}"
