"""Layers that torch.compile has compiled, in every backbone: those that split backwards do not split them."""

from typing import Any

import pytest
import torch

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import ToyModule, split_layers, toy_batch


def _compiled(rank: int, backbones: list[tuple[str, int]]) -> list[tuple[float, dict[str, Any], set[bool]]]:
    results = []
    for backbone, virtual_stages in backbones:
        options = PipelineOptions(ScheduleOptions(backbone=backbone, virtual_stages=virtual_stages))
        stage_rank = options.stage_rank(2)
        mesh = build_mesh(torch.device("cpu"), 1, 2, stage_rank)
        module = ToyModule()
        module.part = part_of(rank, split_layers(4, len(stage_rank)), stage_rank)
        module.configure_model()
        llm: Any = module.llm
        for layer in llm.layers.values():
            layer.compile(dynamic=True)  # by Inductor
        runner = PipelineRunner(module, mesh, options)
        out = runner(toy_batch(4, runner.layout), "train")
        reduce_gradients(runner.places, mesh)
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append((out.loss.item(), gradients, {split is not None for split in runner.executor.splits.values()}))
    return results


@pytest.mark.filterwarnings("ignore")  # of Inductor and of the compilers that it finds
def test_compiled_layers() -> None:
    module = ToyModule()
    module.configure_model()
    loss = module.pipeline(toy_batch(4, PipelineLayout())).loss
    loss.backward()
    backbones = [("1f1b", 1), ("zb1p", 1), ("zbv", 2)]
    for rank in run_ranks(2, _compiled, backbones, timeout=280):
        for (backbone, _), (rank_loss, gradients, splits) in zip(backbones, rank, strict=True):
            assert rank_loss == pytest.approx(loss.item(), rel=1e-5)
            for name, gradient in gradients.items():
                expected = module.get_parameter(name).grad
                assert expected is not None
                assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
            assert splits == (set() if backbone == "1f1b" else {False})
