"""Adapters by peft: in a pipeline as in one process, and folded into the weights that are exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from bigmac_lightning import export_command
from bigmac_lightning.batch import PipelineLayout
from bigmac_lightning.models import MultimodalLM
from bigmac_lightning.models.lora import add_lora, fold_lora
from bigmac_lightning.options import PipelineOptions
from bigmac_lightning.pipeline import PipelineRunner, part_of, split_layers
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from tests.models import zoo
from tests.ranks import run_ranks
from tests.strategy.trainers import plain_trainer

pytest.importorskip("peft")
LORA: dict[str, dict[str, Any]] = {
    "llm": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]},
    "encoders.image": {"r": 2, "target_modules": ["qkv"], "use_rslora": True},
}


def module_of(folder: Path, name: str, dtype: str = "float32") -> MultimodalLM:
    settings: dict[str, Any] = {"lora": LORA, "learning_rate": 1e-2, "schedule": "constant", "dtype": dtype}
    return MultimodalLM.from_pretrained(str(folder / name), **settings)


def gradients(module: MultimodalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _pipelined(rank: int, folder: Path, name: str) -> tuple[float, dict[str, torch.Tensor]]:
    mesh = build_mesh(torch.device("cpu"), 1, 2, range(2))
    module = module_of(folder, name)
    module.part = part_of(rank, split_layers(zoo.LAYERS, 2), range(2))
    module.configure_model()
    module.runner = PipelineRunner(module, mesh, PipelineOptions(group_size=2))
    out = module.pipeline(zoo.batch(zoo.MODELS[name], False, module.runner.layout))
    reduce_gradients(module.runner.places, mesh)
    return out.loss.item(), gradients(module)


@pytest.mark.parametrize(("name", "tower_layers"), [("qwen3_vl", 3), ("qwen2_5_vl", 2)])
def test_against_one_process(name: str, tower_layers: int, tmp_path: Path) -> None:
    zoo.save(name, tmp_path)
    whole = module_of(tmp_path, name)
    whole.configure_model()
    out = whole.pipeline(zoo.batch(zoo.MODELS[name], False, PipelineLayout()))
    out.loss.backward()
    expected = gradients(whole)
    assert expected.keys() == {name for name, _ in whole.named_parameters() if "lora_" in name}
    assert len(expected) == 2 * (2 * zoo.LAYERS + tower_layers)
    seen = set()
    for loss, found in run_ranks(2, _pipelined, tmp_path, name):
        assert loss == pytest.approx(out.loss.item(), rel=1e-6)
        for weight, gradient in found.items():
            error = (gradient - expected[weight]).norm() / expected[weight].norm().clamp(min=1e-6)
            assert error <= 1e-6, weight
            seen.add(weight)
    assert seen == expected.keys()


def test_adapters_beside_bfloat16_weights(tmp_path: Path) -> None:
    """They are float32, and start with the values that they have beside float32 weights."""
    zoo.save("qwen3_vl", tmp_path)
    modules = [module_of(tmp_path, "qwen3_vl", dtype) for dtype in ("float32", "bfloat16")]
    for module in modules:
        module.configure_model()
    exact, half = (dict(module.named_parameters()) for module in modules)
    for name, parameter in half.items():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        if "lora_" in name:
            assert torch.equal(parameter, exact[name])


def test_export_folds_adapters(tmp_path: Path) -> None:
    zoo.save("qwen3_vl", tmp_path)
    module = module_of(tmp_path, "qwen3_vl")
    batch = zoo.batch(zoo.MODELS["qwen3_vl"], False, PipelineLayout())
    trainer = plain_trainer(max_steps=3, limit_val_batches=0)
    data = DataLoader([batch] * 3, batch_size=None)
    trainer.fit(module, data, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    arguments = ["--checkpoint", str(tmp_path / "run.ckpt"), "--output", str(tmp_path / "out" / "qwen3_vl")]
    assert export_command.main(arguments) == 0
    exported, start = zoo.load("qwen3_vl", tmp_path / "out"), zoo.load("qwen3_vl", tmp_path)
    with torch.no_grad():
        module.eval()
        trained = module.pipeline(batch).loss
        assert torch.allclose(zoo.reference_loss(exported, zoo.MODELS["qwen3_vl"], False), trained, rtol=1e-6)
    before = dict(start.named_parameters())
    moved = {name for name, p in exported.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "up_proj", "qkv"}
    assert len(moved) == 2 * zoo.LAYERS + 3


def test_folding_against_the_adapted_layer() -> None:
    torch.manual_seed(0)
    component = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(3, 2)})
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["a"]}
    add_lora(component, "x", settings)
    for parameter in component.parameters():
        parameter.data = torch.randn_like(parameter)
    given = torch.randn(4, 5)
    expected = component["a"](given)
    tensors = {f"x.{name}": tensor for name, tensor in component.state_dict().items()}
    plain = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(3, 2)})
    folded = {name.removeprefix("x."): tensor for name, tensor in fold_lora(tensors, {"x": settings}).items()}
    plain.load_state_dict(folded)
    torch.testing.assert_close(plain["a"](given), expected)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"generators.sound": {}}, r"lora: 'generators.sound' is no component; there are \['llm', 'encoders.image'"),
        ({"llm": {"r": 2}}, r"lora: 'llm' needs \['target_modules'\]"),
        ({"llm": {"r": 2, "target_modules": ["q_proj"], "use_dora": True}}, r"lora: 'llm' has \['use_dora'\]"),
    ],
)
def test_misuse(lora: dict[str, Any], message: str, tmp_path: Path) -> None:
    zoo.save("qwen3_vl", tmp_path)
    with pytest.raises(ValueError, match=message):
        MultimodalLM.from_pretrained(str(tmp_path / "qwen3_vl"), lora=lora)
