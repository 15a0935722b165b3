"""LLMs that draw in their layers, with random options at once, against one process: losses, gradients, drawings."""

from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.models import UnifiedLM
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.models.test_unified import DROPOUT, LAYERS, SIDE, batch, load, module
from tests.ranks import run_ranks
from tests.runtime.matrix import whole
from tests.runtime.test_families import error
from tests.toy import split_layers

FREEZE = [(), ("llm",), ("encoders",), ("generators",), ("llm.*drawn*",), ("llm.*others*",), ("llm.*embed_tokens*",)]


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


def _ranks(rank: int, size: int, cases: list[Case]) -> list[tuple[float, dict[str, Tensor | None], list[Tensor]]]:
    found = []
    for case in cases:
        several = 2 if case.backbone == "interleaved_1f1b" else 1
        rank_of = [stage % size for stage in range(size * several)]
        mesh, unified = build_mesh(torch.device("cpu"), 1, size, rank_of), made(case)
        unified.part = part_of(rank, split_layers(LAYERS, size * several), rank_of)
        load(unified, case.codec)
        schedule = ScheduleOptions(case.policy, group_size=1, backbone=case.backbone, virtual_stages=several)
        unified.runner = PipelineRunner(
            unified, mesh, PipelineOptions(schedule, sharding=ShardingOptions(**case.shards))
        )
        layout = unified.runner.layout
        out = unified.pipeline(given(case, layout))
        reduce_gradients(unified.runner.places, mesh)
        gradients = {name: whole(p.grad) for name, p in unified.named_parameters() if p.requires_grad}
        found.append((out.loss.item(), gradients, drawings(unified, case, layout)))
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.wide) for seed in range(1, 9))])
def test_random_options(seed: int) -> None:
    random = Random(seed)
    cases = [drawn(random) for _ in range(12 if seed else 3)]
    ranks = run_ranks(2, _ranks, 2, cases)
    for number, case in enumerate(cases):
        alone = load(made(case), case.codec)
        out = alone.pipeline(given(case, PipelineLayout()))
        out.loss.backward()
        expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
        tied = {f"llm.{copy}": f"llm.{original}" for copy, original in alone.llm.tied.items()}
        pictures = drawings(alone, case, PipelineLayout())
        for loss, gradients, found in (rank[number] for rank in ranks):
            assert loss == pytest.approx(out.loss.item(), rel=1e-6), case
            for name, gradient in gradients.items():
                wrong = error(gradient, expected[tied.get(name, name)], expected)
                assert wrong < 1e-5, f"{case}: {name}: {wrong:.1e}"
            for one, other in zip(found, pictures, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda m, case=case: f"{case}: {m}")
