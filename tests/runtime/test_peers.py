"""Pipelines whose ranks are several processes (tensor, context, expert parallelism), with shards and replicas, against
plain autograd in one process: loss, the norm, every gradient."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.datamodules.examples.digits import DigitsDataModule
from bigmac_lightning.datamodules.loading.collate import Collator
from bigmac_lightning.models import FlowGenerator, HFDecoder, MultimodalLM, VisionEncoder
from bigmac_lightning.runtime.gradients import global_norm, reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner, part_of, peers_of
from tests.ranks import run_ranks
from tests.runtime.matrix import whole
from tests.runtime.test_real_models import MMDIT, TOWER
from tests.toy import split_layers

LAYERS = 4
MICROBATCHES = 5
DECODERS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", "head_dim": 8},
    "tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "experts": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "output_router_logits": True,
    },
}


@dataclass(frozen=True)
class Case:
    """Sizes of the mesh, and options."""

    dp: int
    pp: int
    cp: int
    tp: int
    decoder: str = "dense"
    expert: int = 1
    sharding: ShardingOptions = ShardingOptions()  # noqa: RUF009  (frozen)
    generator: bool = True
    freeze: tuple[str, ...] = ()
    schedule: ScheduleOptions = ScheduleOptions(group_size=2)  # noqa: RUF009  (frozen)

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    def module(self) -> MultimodalLM:
        common = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "tie_word_embeddings": False,
        }
        generators = {"image": FlowGenerator(32, channels=1, config=MMDIT)} if self.generator else {}
        return MultimodalLM(
            HFDecoder({**common, **DECODERS[self.decoder]}),
            {"image": VisionEncoder(TOWER, width=32)},
            generators,
            freeze=list(self.freeze),
            schedule="constant",
        )

    def batch(self, layout: PipelineLayout, replica: int) -> Batch:
        data = DigitsDataModule(batch_size=20, microbatches=MICROBATCHES, image_rows=16)
        data.setup("fit")
        dataset = data.train_dataloader().dataset
        batch = Collator(layout, MICROBATCHES)([dataset[1, 31 * i + replica] for i in range(20)])
        nothing = torch.empty(0, dtype=torch.long)
        without = {} if self.generator else {"targets": [], "target_positions": nothing}
        return batch.replace(microbatches=[replace(m, **without) for m in batch.microbatches])


FSDP = ShardingOptions("fsdp", "fsdp")
ZERO1 = ShardingOptions("zero1", "zero1", "zero1")
CASES = {
    "tp": Case(1, 2, 1, 2),
    "tp-tied": Case(1, 2, 1, 2, "tied", sharding=FSDP),
    "tp-experts": Case(1, 2, 1, 2, "experts", generator=False),
    "tp-ep": Case(1, 2, 1, 2, "experts", 2, sharding=ShardingOptions("zero1", "fsdp")),
    "cp": Case(1, 2, 2, 1),
    "cp-tied": Case(1, 2, 2, 1, "tied", sharding=ZERO1),
    "cp-experts": Case(1, 2, 2, 1, "experts", sharding=FSDP),
    "cp-frozen": Case(1, 2, 2, 1, freeze=("encoders", "llm.model.layers.0"), sharding=FSDP),
    "cp-zb1p": Case(1, 2, 2, 1, schedule=ScheduleOptions("filled", "zb1p", 1)),
    "tp-recompute": Case(1, 2, 1, 2, schedule=ScheduleOptions("recompute"), freeze=("llm",)),
    "cp-tp": Case(1, 2, 2, 2, "tied"),
    "cp-tp-ep": Case(1, 2, 2, 2, "experts", 2, sharding=FSDP),
    "dp-tp": Case(2, 2, 1, 2, "tied", sharding=ShardingOptions("fsdp", "zero1")),
    "dp-cp": Case(2, 1, 2, 1, sharding=ShardingOptions(stages="zero1")),
    "tp-alone": Case(1, 1, 1, 2),
    "tp-first-stage": Case(1, 2, 1, 2, schedule=ScheduleOptions("first_stage")),
}
NARROW = ("tp-tied", "cp-experts", "cp-zb1p", "tp-ep", "dp-tp", "cp-tp-ep")


def reference(case: Case) -> tuple[float, float, dict[str, Tensor | None]]:
    module = case.module()
    module.configure_model()
    batches = [case.batch(PipelineLayout(), replica) for replica in range(case.dp)]
    out = module.pipeline(batches[0].replace(microbatches=[m for b in batches for m in b]))
    out.loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    norm = torch.nn.utils.get_total_norm([g for g in gradients.values() if g is not None])
    return out.loss.item(), float(norm), gradients


def _pipelined(rank: int, case: Case) -> tuple[float, float, dict[str, Tensor | None], Tensor | None]:
    parallel = ParallelSizes(case.tp, case.cp, case.expert)
    options = PipelineOptions(case.schedule, sharding=case.sharding, parallel=parallel)
    options = options.resolved(case.pp, LAYERS, encoder=True, generator=case.generator)[0]
    stage_rank = options.stage_rank(case.pp)
    mesh = build_mesh(torch.device("cpu"), case.dp, case.pp, stage_rank, cp=case.cp, tp=case.tp)
    module = case.module()
    assert not module.llm.why_not_parallel(parallel)
    part = part_of(mesh.pp_rank, split_layers(LAYERS, len(stage_rank)), stage_rank)
    module.part = replace(part, peers=peers_of(mesh, parallel))
    module.configure_model()
    runner = PipelineRunner(module, mesh, options)
    batch = case.batch(runner.layout, mesh.dp_rank)
    predictions = runner(module.prepare(batch), "evaluate").predictions
    out = runner(module.prepare(batch), "train")
    reduce_gradients(runner.places, mesh)
    gradients = {n: whole(p.grad) for n, p in module.named_parameters() if p.requires_grad}
    return out.loss.item(), global_norm(runner.places, mesh).item(), gradients, predictions


def check(case: Case) -> None:
    loss, norm, expected = reference(case)
    module = case.module()
    module.configure_model()
    seen: set[str] = set()
    for rank, (found, found_norm, gradients, predictions) in enumerate(run_ranks(case.world, _pipelined, case)):
        assert found == pytest.approx(loss, rel=1e-6)
        assert found_norm == pytest.approx(norm, rel=1e-6)
        replica = rank * case.dp // case.world
        with torch.no_grad():
            should = module.pipeline(case.batch(PipelineLayout(), replica)).predictions
        assert predictions is not None
        assert should is not None
        assert (predictions == should).float().mean() > 0.98  # where two tokens are as likely, rounding decides
        floor = 1e-3 * max(g.norm() for g in expected.values() if g is not None)
        for name, gradient in gradients.items():
            canonical = name if name in expected else "llm.model.embed_tokens.weight"
            seen.add(canonical)
            should_be = expected[canonical]
            assert (gradient is None) == (should_be is None), name
            if gradient is not None and should_be is not None:
                error = float((gradient - should_be).norm() / max(should_be.norm(), floor))
                assert error < 2e-6, f"rank {rank}: {name} is off by {error:.1e}"
    assert seen == expected.keys()


@pytest.mark.parametrize("name", NARROW)
def test_against_one_process(name: str) -> None:
    check(CASES[name])


@pytest.mark.wide
@pytest.mark.parametrize("name", [name for name in CASES if name not in NARROW])
def test_further_cases_against_one_process(name: str) -> None:
    check(CASES[name])
