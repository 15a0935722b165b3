"""Attention, losses and compiled layers of GPUs in a pipeline, against one process on the same device."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.utils import is_flash_attn_2_available

from benchmarks.places import Place
from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.models import HFDecoder, MultimodalLM
from bigmac_lightning.models.llm.liger import liger_gradients
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.gpu.places import EVERYWHERE, ON_GPUS, arguments, ranks, trainers
from tests.models import zoo
from tests.runtime import test_real_models as real
from tests.test_token_loss import compare
from tests.toy import ToyData, ToyModule, split_layers
from tests.training.trainers import assert_close, pipeline_trainer, plain_trainer, weights


def _decoder(folder: Path, attention: str) -> MultimodalLM:
    given: dict[str, Any] = {"config": str(folder), "weights": str(folder), "dtype": "bfloat16"}
    return MultimodalLM(HFDecoder(**given, attn_implementation=attention), {})


def _packed(rank: int, device: torch.device, folder: Path, attention: str, size: int) -> Any:
    """Loss and gradients of packed rows, on one of `size` ranks."""
    module = _decoder(folder, attention)
    mesh = build_mesh(device, 1, size, range(size))
    module.part = part_of(rank, split_layers(zoo.LAYERS, size), range(size))
    module.configure_model()
    module.to(device)
    runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions()))
    batch = module.prepare(zoo.batch(zoo.MODELS["llama"], True, runner.layout)).to(device)
    loss = runner(batch, "train").loss
    reduce_gradients(runner.places, mesh)
    return loss, {name: parameter.grad for name, parameter in module.named_parameters()}


def _alone(rank: int, device: torch.device, folder: Path, attention: str) -> Any:
    module = _decoder(folder, attention)
    module.configure_model()
    module.to(device)
    loss = module.pipeline(zoo.batch(zoo.MODELS["llama"], True, PipelineLayout()).to(device)).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("place", EVERYWHERE)
def test_attention_of_packed_rows(place: Place, attention: str, tmp_path: Path) -> None:
    if place.kind == "cpu" and attention != "sdpa":
        pytest.skip("needs a GPU")
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn")
    config = zoo.text(hf.LlamaConfig, hidden_size=128, head_dim=32)()  # these kernels want wide heads
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    ((loss, expected),) = ranks(place, 1, _alone, tmp_path, attention)
    ((_, by_mask),) = ranks(place, 1, _alone, tmp_path, "sdpa")
    seen = set[str]()
    for found, gradients in ranks(place, 2, _packed, tmp_path, attention, 2):
        assert float(found) == pytest.approx(float(loss), rel=1e-3)
        seen |= gradients.keys()
        for name, gradient in gradients.items():
            for others in (expected, by_mask):
                assert (gradient - others[name]).norm() <= 0.05 * others[name].norm(), name
    assert seen == expected.keys()


def _real(rank: int, device: torch.device, *given: Any) -> real.Result:
    return real._pipelined(rank, *given, device)


def _real_alone(rank: int, device: torch.device, *given: Any) -> real.Result:
    return real._plain(rank, *given, device)


@pytest.mark.parametrize(
    ("size", "family", "tied", "backbone", "fused"),
    [
        (2, "qwen3", True, "1f1b", "liger"),
        (2, "llama", False, "zb1p", "liger"),
        (3, "qwen3", False, "1f1b", True),
        (3, "llama", True, "zb1p", False),
    ],
)
@pytest.mark.parametrize("place", EVERYWHERE)
def test_losses_and_generators(place: Place, size: int, family: str, tied: bool, backbone: str, fused: Any) -> None:
    if place.kind == "cpu" and fused == "liger":
        pytest.skip("needs a GPU")
    (alone,) = ranks(place, 1, _real_alone, family, tied)
    found = ranks(place, size, _real, size, family, tied, "nested", backbone, fused)
    real.compare(alone, found, 2e-6 if place.kind == "cpu" else 5e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_liger_kernels_alone(kind: str) -> None:
    compare(kind, liger_gradients, "cuda")


def _compiled(rank: int, strategy: dict[str, Any], trainer: dict[str, Any]) -> Any:
    module = ToyModule(tied=True, optimizer="sgd")
    fitting = pipeline_trainer(2, {"compile": True, **strategy}, max_steps=2, **trainer)
    fitting.fit(module, ToyData(steps=2, text_only=(1,)))
    return weights(module)


def _not_compiled(rank: int, trainer: dict[str, Any]) -> Any:
    module = ToyModule(tied=True, optimizer="sgd")
    plain_trainer(max_steps=2, **trainer).fit(module, ToyData(steps=2, text_only=(1,)))
    return weights(module)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ON_GPUS)
def test_compiled_layers(place: Place) -> None:
    (expected,) = trainers(place, 1, _not_compiled, arguments(place, 1)[1])
    for found in trainers(place, 2, _compiled, *arguments(place, 2), timeout=800):
        assert_close(found, expected, 1e-4)
