"""An exported folder is used again: to start a training from, and to be asked without a Trainer."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import bigmac_lightning
from bigmac_lightning import run_config
from bigmac_lightning.commands.export import export_checkpoint
from bigmac_lightning.datamodules import DigitsDataModule, MultimodalDataModule, byte_tokenizer
from bigmac_lightning.loaded_run import _Reader
from bigmac_lightning.models import (
    AudioEncoder,
    FlowGenerator,
    HFDecoder,
    HFVisionEncoder,
    LatentCodec,
    MultimodalLM,
    UnifiedLM,
    VisionEncoder,
)
from bigmac_lightning.models.export import OTHERS
from bigmac_lightning.models.lora import fold_lora
from tests.cli import commands
from tests.cli.test_loading import CODEC
from tests.models import zoo
from tests.models.parts import TOWER, WIDTH, decoder_config
from tests.models.test_audio import WHISPER
from tests.training.trainers import on_ranks, pipeline_trainer

ROOT = Path(__file__).parents[2]
FLOW = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]}
LORA = {
    "llm": {"r": 2, "target_modules": ["q_proj"]},
    "encoders.image": {"r": 2, "target_modules": ["fc1"], "use_rslora": True},
    "generators.image": {"r": 2, "target_modules": ["to_q"]},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _generator(seed: int, **changes: Any) -> FlowGenerator:
    return FlowGenerator(WIDTH, channels=changes.pop("channels", 1), config=FLOW, seed=seed, **changes)


def _built(kind: str, seed: int, **changes: Any) -> MultimodalLM:
    """A model of each kind of component; the seed is that of its initial weights."""
    llm = HFDecoder(decoder_config(tie_word_embeddings=kind != "untied"), seed)
    if kind == "experts":
        llm = HFDecoder(decoder_config("qwen3_moe", **EXPERTS), seed)
    encoders: dict[str, Any] = {
        "image": VisionEncoder(TOWER, WIDTH, projector_hidden=20, seed=seed),
        "sound": AudioEncoder(WHISPER, WIDTH, merge=5, seed=seed),
    }
    generator = _generator(seed, queries=3)
    if kind == "codec":
        generator = _generator(seed, channels=2, codec=LatentCodec(CODEC, seed))
    if kind == "vision_language":
        config = zoo.MODELS["qwen3_vl"].config()
        llm, encoders["image"] = HFDecoder(config, seed), HFVisionEncoder(config, seed)
    if kind == "another_model's_tower":
        encoders["image"] = HFVisionEncoder(zoo.MODELS["qwen2_5_vl"].config(), seed)
    return MultimodalLM(llm, encoders, {"image": generator}, schedule="constant", **changes)


def _saved(module: MultimodalLM, path: Path) -> dict[str, Tensor]:
    """Save a module with random weights, as a training does. Returns: its weights with adapters folded in."""
    module.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return fold_lora(module.state_dict(), module.lora)


def _exported(kind: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    expected = _saved(_built(kind, 0, **changes), folder / "x.ckpt")
    export_checkpoint(str(folder / "x.ckpt"), str(folder / "out"))
    return expected


def _assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "kind", ["tied", "untied", "experts", "codec", "lora", "vision_language", "another_model's_tower"]
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_starts_from_what_was_exported(kind: str, dtype: str | None, tmp_path: Path) -> None:
    """Every tensor of every kind of component is, bit by bit, the one that was written."""
    expected = _saved(_built(kind, 0, lora=LORA if kind == "lora" else None), tmp_path / "x.ckpt")
    export_checkpoint(str(tmp_path / "x.ckpt"), str(tmp_path / "out"), dtype=dtype)
    module = _built(kind, 1, init_from=str(tmp_path / "out"))
    module.configure_model()
    if dtype is not None:
        expected = {n: t.to(torch.bfloat16).to(t.dtype) if t.is_floating_point() else t for n, t in expected.items()}
    _assert_equal(module.state_dict(), expected)
    for copy, original in module.tied_copies.items():
        assert module.get_parameter(copy) is module.get_parameter(original)


@pytest.mark.parametrize("component", ["llm", "encoders.image", "generators.image"])
@pytest.mark.parametrize("kind", ["tied", "vision_language"])
def test_one_component_starts_from_it(kind: str, component: str, tmp_path: Path) -> None:
    """The others keep their own initial weights."""
    exported = _exported(kind, tmp_path)
    alone = _built(kind, 1)
    alone.configure_model()
    module = _built(kind, 1, init_from={component: str(tmp_path / "out")})
    module.configure_model()
    expected = {
        name: exported[name] if name.startswith(f"{component}.") else tensor
        for name, tensor in alone.state_dict().items()
    }
    assert any(not torch.equal(expected[name], tensor) for name, tensor in alone.state_dict().items())
    _assert_equal(module.state_dict(), expected)


def test_a_generator_moves_to_another_decoder(tmp_path: Path) -> None:
    exported = _exported("experts", tmp_path)
    module = _built("tied", 1, init_from={"generators.image": str(tmp_path / "out")})
    module.configure_model()
    found = {name: tensor for name, tensor in module.state_dict().items() if name.startswith("generators.")}
    _assert_equal(found, {name: tensor for name, tensor in exported.items() if name.startswith("generators.")})


def test_adapters_come_on_top_of_it(tmp_path: Path) -> None:
    """A run with adapters starts from the weights of the folder, which are then those that its adapters go with."""
    exported = _exported("tied", tmp_path)
    module = _built("tied", 1, init_from=str(tmp_path / "out"), lora={"llm": LORA["llm"]})
    checkpoint = _saved_description(module)
    _assert_equal(fold_lora(module.state_dict(), module.lora), exported)  # lora_B starts as zeros
    assert checkpoint["source"] == str(tmp_path / "out")
    assert checkpoint["source_is_base"]


def _saved_description(module: MultimodalLM) -> dict[str, Any]:
    module.configure_model()
    checkpoint = dict[str, Any]()
    module.on_save_checkpoint(checkpoint)
    return checkpoint["hugging_face"]


def test_adapters_alone_are_not_written_beside_other_weights(tmp_path: Path) -> None:
    """peft would put them beside a model that they were not trained with."""
    zoo.save("llama", tmp_path)
    start = str(tmp_path / "llama")
    first = MultimodalLM.from_pretrained(start)
    _saved(first, tmp_path / "first.ckpt")
    adapted = {"lora": {"llm": LORA["llm"]}}
    second = MultimodalLM.from_pretrained(start, init_from=str(tmp_path / "first.ckpt"), **adapted)
    _saved(second, tmp_path / "second.ckpt")
    with pytest.raises(ValueError, match=r"but from other weights, too \(init_from\)"):
        export_checkpoint(str(tmp_path / "second.ckpt"), str(tmp_path / "adapters"), adapters=True)
    assert not (tmp_path / "adapters").exists()
    export_checkpoint(str(tmp_path / "second.ckpt"), str(tmp_path / "out"))
    third = MultimodalLM.from_pretrained(start, init_from=str(tmp_path / "out"), **adapted)
    _saved(third, tmp_path / "third.ckpt")
    export_checkpoint(str(tmp_path / "third.ckpt"), str(tmp_path / "adapters"), adapters=True)
    base = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "out")
    for use in (
        lambda: MultimodalLM.from_pretrained(start, init_from=str(tmp_path / "adapters"), **adapted).configure_model(),
        lambda: bigmac_lightning.load(tmp_path / "adapters"),
    ):
        with pytest.raises(ValueError, match=r"has adapters \(adapter_config.json\), and not the weights"):
            use()


def _without(file: Path, name: str) -> None:
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file)


def _with(file: Path, name: str, shape: tuple[int, ...] = (2,)) -> None:
    save_file({**load_file(file), name: torch.zeros(shape)}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out: _without(out / OTHERS, "encoders.sound.projector.bias"),
            r"encoders\.sound\.projector\.bias: missi",
        ),
        (lambda out: _with(out / OTHERS, "generators.video.x"), r"generators\.video\.x: not in the model"),
        (lambda out: _with(out / OTHERS, "generators.image.x"), r"generators\.image\.x: not in the model"),
        (lambda out: _with(out / OTHERS, "encoders.sound.projector.bias"), r"\(2,\) in the checkpoint, \(32,\) in the"),
        (lambda out: (out / OTHERS).unlink(), r"encoders\.image\.tower\.embeddings\.patch_embedding\.weight: missing"),
        (lambda out: _without(out / "model.safetensors", "model.norm.weight"), r"model\.norm\.weight: missing"),
        (lambda out: _with(out / "model.safetensors", "model.x"), r"model\.x: not in the model"),
        (lambda out: _with(out / "model.safetensors", "model.norm.weight"), r"model\.norm\.weight: \(2,\) in the chec"),
        (lambda out: (out / "model.safetensors").unlink(), r"cannot load .*out as a Qwen3ForCausalLM"),
        (lambda out: (out / OTHERS).write_bytes(b"x"), r"cannot load .*out as a MultimodalLM"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    """They are refused by name."""
    _exported("tied", tmp_path)
    change(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        _built("tied", 1, init_from=str(tmp_path / "out")).configure_model()


def test_a_part_of_the_model_that_nothing_reads(tmp_path: Path) -> None:
    _exported("vision_language", tmp_path)
    llm = HFDecoder(zoo.MODELS["qwen3_vl"].config())
    encoders: Any = {"sound": AudioEncoder(WHISPER, WIDTH, merge=5)}
    out = str(tmp_path / "out")
    module = MultimodalLM(llm, encoders, {"image": _generator(0, queries=3)}, init_from=out)
    with pytest.raises(ValueError, match=r"model\.visual\.blocks\.0\.attn\.proj\.bias: not in the model"):
        module.configure_model()


def test_two_components_with_the_same_part(tmp_path: Path) -> None:
    """The folder could hold only one of them."""
    config = zoo.MODELS["qwen3_vl"].config()
    encoders: Any = {"image": HFVisionEncoder(config), "other": HFVisionEncoder(config)}
    _saved(MultimodalLM(HFDecoder(config), encoders), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"several components have model\.visual\.\S+, and the Hugging Face model has"):
        export_checkpoint(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))


class _Batches(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        from bigmac_lightning.datamodules import Collator
        from tests.models.parts import samples

        assert self.trainer is not None
        layout = self.trainer.strategy.pipeline_layout
        return DataLoader([Collator(layout, 4)(samples("rdtr"))], batch_size=None)

    val_dataloader = train_dataloader


def _start(rank: int, out: str) -> list[dict[str, Tensor]]:
    """The weights of a rank before anything is learnt: of a pipeline, and of one whose components lie in shards."""
    from bigmac_lightning import ShardingOptions
    from tests.training.trainers import whole

    found = []
    for arguments in ({}, {"sharding": ShardingOptions(encoders="fsdp", generators="fsdp")}):
        module = _built("experts", 1, init_from=out, learning_rate=0.0, weight_decay=0.0)
        trainer = pipeline_trainer(2, arguments, max_steps=1, limit_val_batches=0)
        trainer.fit(module, _Batches())
        found.append({name: whole(parameter.detach()).clone() for name, parameter in module.named_parameters()})
    return found


def test_two_ranks_start_from_it(tmp_path: Path) -> None:
    """Each rank has its part of the weights, also where a component lies in shards."""
    expected = _exported("experts", tmp_path)
    for ranks in zip(*on_ranks(2, _start, str(tmp_path / "out")), strict=True):
        for found in ranks:
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), name
        assert {name for found in ranks for name in found} == expected.keys()


# -- load --------------------------------------------------------------------------------------------------------------


def _run_with_a_config(folder: Path) -> dict[str, Tensor]:
    """A run whose components were built from folders of pretrained models, and which has learnt adapters."""
    llm = HFDecoder({**decoder_config(), "vocab_size": 262}).build_whole()
    llm.config.save_pretrained(folder / "decoder")
    byte_tokenizer().save_pretrained(folder / "decoder")
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(json.dumps(TOWER))
    class_path, init_args = "class_path", "init_args"
    decoder = {"config": str(folder / "decoder"), "weights": str(folder / "decoder")}
    tower = {"config": str(folder / "tower"), "width": WIDTH}
    arguments = {
        "llm": {class_path: "bigmac_lightning.models.HFDecoder", init_args: decoder},
        "encoders": {"image": {class_path: "bigmac_lightning.models.VisionEncoder", init_args: tower}},
        "lora": {"llm": LORA["llm"]},
        "init_from": {"encoders.image": "gone.ckpt"},
        "learning_rate": 1e-5,
    }
    config = {
        "seed_everything": 0,
        "trainer": {"max_steps": 1, "logger": False},
        "model": {class_path: "bigmac_lightning.models.MultimodalLM", init_args: arguments},
        "data": {
            class_path: "bigmac_lightning.datamodules.MultimodalDataModule",
            init_args: {"processor": str(folder / "decoder"), "token_budget": 64},
        },
    }
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    encoder: Any = VisionEncoder(TOWER, WIDTH)
    module = MultimodalLM(HFDecoder(str(folder / "decoder")), {"image": encoder}, lora={"llm": LORA["llm"]})
    module.llm.source = None  # pyright: ignore[reportAttributeAccessIssue]
    module.configure_model()
    module.llm.source = str(folder / "decoder")  # pyright: ignore[reportAttributeAccessIssue]
    return _saved(module, folder / "run" / "checkpoints" / "x.ckpt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser
def test_the_folder_alone_is_loaded(tmp_path: Path) -> None:
    """It may be moved, and nothing else of the run is needed: no checkpoint, no pretrained model."""
    there = tmp_path / "there"
    there.mkdir()
    expected = _run_with_a_config(there)
    export_checkpoint(str(there / "run" / "checkpoints" / "x.ckpt"), str(there / "out"))
    config = (there / "out" / "config.yaml").read_text()
    assert str(there) not in config
    assert "trainer" not in config
    (there / "out").rename(tmp_path / "another's folder")
    there.rename(tmp_path / "gone")
    run = bigmac_lightning.load(tmp_path / "another's folder", device="cpu")
    assert isinstance(run.module, MultimodalLM)
    assert not run.module.training
    _assert_equal(run.module.state_dict(), expected)
    assert isinstance(run.data, MultimodalDataModule)
    assert len([*run.generate(run.prompt("hello"), max_new_tokens=2)]) <= 2


IN_ANOTHER_PROCESS = """
import sys
import bigmac_lightning
run = bigmac_lightning.load(sys.argv[1], device="cpu")
run.draw("draw a 3 :", seed=5)[0].save("three.png")
print(run.chat("<image> which digit is this ?", images=["three.png"], max_new_tokens=5))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser
def test_a_model_that_draws_in_its_llm(tmp_path: Path) -> None:
    """The folder has the weights for text as a Hugging Face model, and draws and replies as the run did."""
    config = yaml.safe_load((ROOT / "configs" / "drawn_digits.yaml").read_text())
    config["model"]["init_args"] |= {"steps": 2, "condition_dropout": 0.1, "guidance_scale": 2.0}
    path = tmp_path / "run" / "checkpoints" / "x.ckpt"
    path.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({name: config[name] for name in ("model", "data")}))
    module = _Reader.of(tmp_path / "run" / "config.yaml", None).model
    assert isinstance(module, UnifiedLM)
    expected = _saved(module, path)
    export_checkpoint(str(path), str(tmp_path / "out"))
    run = bigmac_lightning.load(path, device="cpu")
    picture = run.draw("draw a 3 :", seed=5)[0]
    reply = run.chat("<image> which digit is this ?", images=[picture], max_new_tokens=5)
    shutil.rmtree(tmp_path / "run")
    done = commands.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "out")], tmp_path)
    assert done.stdout.strip() == reply
    assert (np.asarray(Image.open(tmp_path / "three.png")) == np.asarray(picture)).all()
    ids = torch.tensor([[5, 9, 20, 7, 11]])
    inputs = module.llm.prepare({"input_ids": ids})
    with torch.no_grad():
        h = module.llm.run_layers(module.llm.embed(inputs), inputs, range(module.llm.num_layers), {})
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        torch.testing.assert_close(module.llm.logits(h), alone)
    trained = _Reader.of(tmp_path / "out" / "config.yaml", None).model
    assert isinstance(trained, UnifiedLM)
    trained.init_from = {"": str(tmp_path / "out")}
    trained.configure_model()
    _assert_equal(trained.state_dict(), expected)


@pytest.mark.wide
def test_a_model_that_draws_in_its_llm_from_slices(tmp_path: Path) -> None:
    """Two stages, alone and of two tensor peers each, learn and export the same."""
    found, init_args = list[dict[str, Tensor]](), "--trainer.strategy.init_args"
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
    for tensor in (1, 2):
        folder = tmp_path / str(tensor)
        folder.mkdir()
        given = [f"--config={ROOT / 'configs' / 'drawn_digits.yaml'}", f"--trainer.devices={2 * tensor}", *few]
        commands.bigmac(2 * tensor, folder, "fit", *given, f"{init_args}.tensor_parallel_size={tensor}")
        (checkpoint,) = folder.glob("runs/drawn_digits/version_0/checkpoints/*")
        export_checkpoint(str(checkpoint), str(folder / "out"))
        found.append(load_file(folder / "out" / "model.safetensors") | load_file(folder / "out" / OTHERS))
    whole, sliced = found
    # The gradients of biases of keys are nothing but rounding.
    settled = {name: tensor for name, tensor in whole.items() if "k_proj.bias" not in name}
    assert any(".drawn." in name for name in settled)
    for name, tensor in settled.items():
        torch.testing.assert_close(sliced[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_and_data_of_ones_own(tmp_path: Path) -> None:
    """Where the run had no config.yaml, they are given."""
    expected = _exported("tied", tmp_path)
    out = tmp_path / "out"
    assert not (out / "config.yaml").exists()
    with pytest.raises(
        ValueError, match=r"no config\.yaml in .*out, as the run that was exported had none: give load\("
    ):
        bigmac_lightning.load(out)
    module = _built("tied", 1, init_from="gone")
    run = bigmac_lightning.load(out, module, DigitsDataModule(), "cpu")
    assert run.checkpoint == out
    _assert_equal(module.state_dict(), expected)
    with pytest.raises(ValueError, match="has weights already: give load a new one"):
        bigmac_lightning.load(out, module, DigitsDataModule(), "cpu")
    with pytest.raises(ValueError, match=r"lm_head\.weight: missing"):
        bigmac_lightning.load(out, _built("untied", 1), DigitsDataModule(), "cpu")


def test_a_config_does_not_make_secrets_be_copied(tmp_path: Path) -> None:
    """The config beside a checkpoint may come from a stranger, and names folders."""
    for name, text in (("secret", '{"password": "x"}'), ("model", '{"model_type": "qwen3"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "key").write_text("secret")
    names = {"config": str(tmp_path / "secret"), "weights": str(tmp_path / "model"), "other": str(tmp_path / "model")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"llm": names}}}))
    (tmp_path / "out").mkdir()
    run_config.write_exported(tmp_path / "config.yaml", None, tmp_path / "out")
    found = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert found == {"model": {"init_args": {"llm": {**names, "weights": "<this folder>/components/0"}}}}
    copied = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert copied == ["components/0/config.json", "config.yaml"]
