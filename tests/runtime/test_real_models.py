"""The parts that ship (Hugging Face decoder and vision tower, diffusers transformer) in a pipeline, on real digits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.datamodules.examples.digits import DigitsDataModule
from bigmac_lightning.datamodules.loading.collate import Collator
from bigmac_lightning.models import FlowGenerator, HFDecoder, MultimodalLM, VisionEncoder
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import split_layers

LAYERS = 5
MICROBATCHES = 7


TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MMDIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}


def build(family: str, tied: bool, fused: Any = False) -> MultimodalLM:
    decoder: dict[str, Any] = {
        "model_type": family,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": tied,
    }
    return MultimodalLM(
        HFDecoder(decoder | ({"head_dim": 8} if family == "qwen3" else {}), fused_loss=fused),
        {"image": VisionEncoder(TOWER, width=32)},
        {"image": FlowGenerator(32, channels=1, config=MMDIT)},
    )


def batch(layout: PipelineLayout) -> Any:
    data = DigitsDataModule(batch_size=40, microbatches=MICROBATCHES, image_rows=16)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    return Collator(layout, MICROBATCHES)([dataset[1, 31 * i] for i in range(40)])


def gradients(module: PipelineModule) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.cpu() for n, p in module.named_parameters() if p.requires_grad}


def _pipelined(
    rank: int, size: int, family: str, tied: bool, policy: str, backbone: str, fused: Any, device: Any = "cpu"
) -> tuple[float, dict[str, torch.Tensor | None]]:
    options = PipelineOptions(ScheduleOptions(policy, backbone, group_size=2)).resolved(
        size, 4, encoder=True, generator=True
    )[0]
    stage_rank = options.stage_rank(size)
    mesh = build_mesh(torch.device(device), 1, size, stage_rank)
    module = build(family, tied, fused)
    module.part = part_of(rank, split_layers(LAYERS, len(stage_rank)), stage_rank)
    module.configure_model()
    module.to(device)
    runner = PipelineRunner(module, mesh, options)
    out = runner(module.prepare(batch(runner.layout)).to(device), "train")
    reduce_gradients(runner.places, mesh)
    return out.loss.item(), gradients(module)


@pytest.mark.parametrize(
    ("size", "family", "tied", "policy", "backbone", "fused"),
    [
        (2, "qwen3", True, "nested", "1f1b", False),
        (3, "qwen3", False, "nested", "1f1b", False),
        (2, "llama", False, "recompute", "1f1b", False),
        (5, "llama", True, "nested", "1f1b", False),
        (4, "qwen3", True, "disaggregated", "1f1b", False),
        (2, "qwen3", True, "nested", "1f1b", True),
        (2, "llama", False, "nested", "zb1p", True),
    ],
)
def test_against_one_process(size: int, family: str, tied: bool, policy: str, backbone: str, fused: Any) -> None:
    compare(_plain(0, family, tied), run_ranks(size, _pipelined, size, family, tied, policy, backbone, fused), 1e-6)


Result = tuple[float, dict[str, torch.Tensor | None]]
"""Loss and gradients."""


def _plain(rank: int, family: str, tied: bool, device: Any = "cpu") -> Result:
    """One process whose loss is not fused."""
    whole = build(family, tied)
    whole.configure_model()
    whole.to(device)
    given = batch(PipelineLayout())
    assert any(not m.media for m in given.microbatches) or len({len(m.media) for m in given.microbatches}) > 2
    out = whole.pipeline(given.to(device))
    out.loss.backward()
    return out.loss.item(), gradients(whole)


def compare(plain: Result, by_rank: list[Result], tolerance: float) -> None:
    known, expected = plain
    assert sum(g is not None for g in expected.values()) > 40
    seen = set()
    for loss, found in by_rank:
        assert loss == pytest.approx(known, rel=tolerance)
        for name, gradient in found.items():
            reference = expected[name if name in expected else "llm.model.embed_tokens.weight"]
            seen.add(name)
            if reference is None:
                assert gradient is None, name
                continue
            assert gradient is not None, name
            error = (gradient - reference).norm() / reference.norm()
            assert error <= tolerance or (gradient - reference).abs().max() < 1e-9, f"{name}: {error:.1e}"
    assert seen >= expected.keys()


LIGER = """
from bigmac_lightning.models.llm.liger import liger_gradients
from tests.runtime.test_real_models import test_against_one_process
from tests.test_token_loss import compare
compare("float32", liger_gradients)
compare("bfloat16", liger_gradients)
test_against_one_process(2, "llama", False, "nested", "zb1p", "liger")
"""


def test_the_loss_by_liger_kernels() -> None:
    """Interpreted on the CPU, which has to be said before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LIGER], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
