"""Adapters by peft: in a pipeline as in one process, and folded into the weights that are exported."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.commands import export as export_command
from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.models import MultimodalLM
from bigmac_lightning.models.lora import add_lora, fold_lora, targets_of
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.cli.test_export import ZooData
from tests.models import zoo
from tests.ranks import run_ranks
from tests.toy import split_layers
from tests.training.trainers import on_ranks, pipeline_trainer

pytest.importorskip("peft")
LORA: dict[str, dict[str, Any]] = {
    "llm": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]},
    "encoders.image": {"r": 2, "target_modules": ["qkv"], "use_rslora": True},
}


UPPER = {"llm": {"r": 4, "target_modules": r"model\.layers\.[34]\..*\.(q_proj|up_proj)"}}
OUTPUT = {"llm": {"r": 4, "target_modules": ["lm_head", "v_proj"]}}


def module_of(folder: Path, name: str, dtype: str = "float32", lora: Any = None) -> MultimodalLM:
    arguments: dict[str, Any] = {"lora": lora or LORA, "learning_rate": 1e-2, "schedule": "constant", "dtype": dtype}
    return MultimodalLM.from_pretrained(str(folder / name), **arguments)


def gradients(module: MultimodalLM) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _pipelined(
    rank: int, size: int, folder: Path, name: str, lora: Any, policy: str
) -> tuple[float, dict[str, torch.Tensor]]:
    module = module_of(folder, name, lora=lora)
    options = PipelineOptions(ScheduleOptions(policy, group_size=2)).resolved(
        size, zoo.LAYERS, bool(module.encoders), False
    )[0]
    stage_rank = options.stage_rank(size)
    mesh = build_mesh(torch.device("cpu"), 1, size, stage_rank)
    module.part = part_of(rank, split_layers(zoo.LAYERS, len(stage_rank)), stage_rank)
    module.configure_model()
    module.runner = PipelineRunner(module, mesh, options)
    module.configure_optimizers()
    out = module.pipeline(zoo.batch(zoo.MODELS[name], False, module.runner.layout))
    reduce_gradients(module.runner.places, mesh)
    return out.loss.item(), gradients(module)


@pytest.mark.parametrize(
    ("name", "lora", "size", "policy", "adapters"),
    [
        ("qwen3_vl", LORA, 2, "nested", 2 * zoo.LAYERS + 3),
        ("qwen2_5_vl", LORA, 2, "nested", 2 * zoo.LAYERS + 2),
        ("qwen3_vl", LORA, 3, "disaggregated", 2 * zoo.LAYERS + 3),  # a rank holds nothing of the LLM
        ("llama", UPPER, 2, "nested", 4),  # the first rank has nothing to train
        ("llama", OUTPUT, 3, "nested", zoo.LAYERS + 1),
    ],
)
def test_against_one_process(name: str, lora: Any, size: int, policy: str, adapters: int, tmp_path: Path) -> None:
    zoo.save(name, tmp_path)
    whole = module_of(tmp_path, name, lora=lora)
    whole.configure_model()
    out = whole.pipeline(zoo.batch(zoo.MODELS[name], False, PipelineLayout()))
    out.loss.backward()
    expected = gradients(whole)
    assert expected.keys() == {name for name, _ in whole.named_parameters() if "lora_" in name}
    assert len(expected) == 2 * adapters
    seen = set()
    for loss, found in run_ranks(size, _pipelined, size, tmp_path, name, lora, policy):
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


def _train(rank: int, size: int, folder: Path, name: str, lora: Any) -> None:
    trainer = pipeline_trainer(size, max_steps=3, limit_val_batches=0)
    trainer.fit(module_of(folder, name, lora=lora), ZooData(name))
    trainer.save_checkpoint(folder / "run.ckpt")


@pytest.mark.parametrize(
    ("name", "lora", "size", "adapted"),
    [
        ("qwen3_vl", LORA, 1, 2 * zoo.LAYERS + 3),
        ("llama", UPPER, 2, 4),
        ("llama", OUTPUT, 2, zoo.LAYERS + 1),
    ],
)
def test_export_folds_adapters(name: str, lora: Any, size: int, adapted: int, tmp_path: Path) -> None:
    zoo.save(name, tmp_path)
    on_ranks(size, _train, size, tmp_path, name, lora)
    module = module_of(tmp_path, name, lora=lora)
    module.configure_model()
    module.load_state_dict(CheckpointWeights(tmp_path / "run.ckpt").read())
    arguments = ["--checkpoint", str(tmp_path / "run.ckpt"), "--output", str(tmp_path / "out" / name)]
    assert export_command.main(arguments) == 0
    exported, start = zoo.load(name, tmp_path / "out"), zoo.load(name, tmp_path)
    with torch.no_grad():
        trained = module.pipeline(zoo.batch(zoo.MODELS[name], False, PipelineLayout())).loss
        assert torch.allclose(zoo.reference_loss(exported, zoo.MODELS[name], False), trained, rtol=1e-6)
    before = dict(start.named_parameters())
    moved = {weight for weight, p in exported.named_parameters() if not torch.equal(p, before[weight])}
    assert len(moved) == adapted


BOTH = {"llm": LORA["llm"], "encoders.image": {"r": 2, "target_modules": ["qkv"]}}


@pytest.mark.parametrize(("name", "lora", "size"), [("qwen3_vl", BOTH, 1), ("llama", UPPER, 2), ("llama", OUTPUT, 2)])
def test_adapters_alone_are_what_peft_loads(name: str, lora: Any, size: int, tmp_path: Path) -> None:
    from peft import PeftModel

    zoo.save(name, tmp_path)
    on_ranks(size, _train, size, tmp_path, name, lora)
    given = ["--checkpoint", str(tmp_path / "run.ckpt"), "--output"]
    assert export_command.main([*given, str(tmp_path / "out" / name)]) == 0
    assert export_command.main([*given, str(tmp_path / "adapters"), "--adapters=true"]) == 0
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    exported, start = zoo.load(name, tmp_path / "out"), zoo.load(name, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # by peft 0.21
        merged = PeftModel.from_pretrained(start, str(tmp_path / "adapters")).merge_and_unload()
    expected = dict(exported.named_parameters())
    for weight, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[weight], rtol=1e-5, atol=1e-6)


def test_adapters_that_peft_cannot_have(tmp_path: Path, capsys: Any) -> None:
    zoo.save("qwen3_vl", tmp_path)
    module = module_of(tmp_path, "qwen3_vl")
    module.configure_model()
    noted = {"config": zoo.MODELS["qwen3_vl"].config().to_dict(), "source": str(tmp_path / "qwen3_vl"), "lora": LORA}
    given = ["--checkpoint", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out"), "--adapters=true"]
    for changes, message in (
        ({}, "components differ in use_rslora"),
        ({"lora": {}}, "has no low-rank adapters: leave out --adapters"),
        ({"source": None}, "adapters alone would be worth nothing"),
    ):
        torch.save({"state_dict": module.state_dict(), "hugging_face": {**noted, **changes}}, tmp_path / "a.ckpt")
        assert export_command.main(given) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_what_is_not_among_adapters_alone_is_told(tmp_path: Path, capsys: Any) -> None:
    zoo.save("qwen3_vl", tmp_path)
    module = module_of(tmp_path, "qwen3_vl", lora={"llm": LORA["llm"]})
    module.configure_model()
    noted = {"config": zoo.MODELS["qwen3_vl"].config().to_dict(), "source": str(tmp_path / "qwen3_vl")}
    noted["lora"] = {"llm": LORA["llm"]}
    torch.save({"state_dict": module.state_dict(), "hugging_face": noted}, tmp_path / "a.ckpt")
    given = ["--checkpoint", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out"), "--adapters=true"]
    assert export_command.main(given) == 0
    others = sum(name.startswith("encoders.image.") for name in module.state_dict())
    assert f"not written: {others} tensors of components without adapters" in " ".join(capsys.readouterr().out.split())


def test_folding_against_the_adapted_layer() -> None:
    torch.manual_seed(0)
    component = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(3, 2)})
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["a"]}
    add_lora(component, "x", options, targets_of(component, "x", options))
    for parameter in component.parameters():
        parameter.data = torch.randn_like(parameter)
    given = torch.randn(4, 5)
    expected = component["a"](given)
    tensors = {f"x.{name}": tensor for name, tensor in component.state_dict().items()}
    plain = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(3, 2)})
    folded = {name.removeprefix("x."): tensor for name, tensor in fold_lora(tensors, {"x": options}).items()}
    plain.load_state_dict(folded)
    torch.testing.assert_close(plain["a"](given), expected)


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        (
            "qwen3_vl",
            {"generators.sound": {}},
            r"lora: 'generators.sound' is no component; there are \['llm', 'encoders",
        ),
        ("qwen3_vl", {"llm": {"r": 2}}, r"lora: 'llm' needs \['target_modules'\]"),
        ("qwen3_vl", {"llm": {"r": 2, "target_modules": ["q_proj"], "use_dora": True}}, r"'llm' has \['use_dora'\]"),
        ("qwen3_vl", {"encoders.video": {"r": 2, "target_modules": ["qkv"]}}, "'encoders.video' has no layer 'qkv'"),
        ("llama", {"llm": {"r": 2, "target_modules": ["q_proj", "w_pack"]}}, "'llm' has no layer 'w_pack'; there are"),
        ("llama", {"llm": {"r": 2, "target_modules": "all-linear"}}, "'llm' has no layer 'all-linear'"),
        ("llama", {"llm": {"r": 2, "target_modules": ".*mlp"}}, r"means model.layers.0.mlp, too, a LlamaMLP"),
        ("llama", {"llm": {"r": 2, "target_modules": ["embed_tokens"]}}, "means model.embed_tokens, too, a Embedding"),
        ("qwen3", {"llm": {"r": 2, "target_modules": ["lm_head"]}}, "lm_head is tied to the embedding"),
        ("mixtral", {"llm": {"r": 2, "target_modules": ["down_proj"]}}, "experts.down_proj, too, a weight of experts"),
    ],
)
def test_misuse(name: str, lora: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Refused when the module is made, before any rank has its part."""
    zoo.MODELS[name].config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MultimodalLM.from_pretrained(str(tmp_path), lora=lora)


def test_a_fused_loss_needs_a_plain_output_layer(tmp_path: Path) -> None:
    zoo.MODELS["llama"].config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fused_loss needs lm_head without an adapter"):
        MultimodalLM.from_pretrained(str(tmp_path), lora=OUTPUT, fused_loss=True)
