"""From the folder of a checkpoint, through training on two ranks, to a folder that transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors import safe_open
from torch.utils.data import DataLoader
from transformers import AutoConfig

from bigmac_lightning.commands import export as export_command
from bigmac_lightning.models import HFDecoder, MultimodalLM
from bigmac_lightning.models.export import export
from tests.cli.commands import bigmac, run
from tests.models import more_families, tiny, zoo
from tests.training.trainers import on_ranks, pipeline_trainer

STEPS = 3
PARTITIONS: dict[str, Any] = {"qwen3": [1, 4], "qwen3_moe": "auto", "qwen3_vl": [4, 1]}


class ZooData(LightningDataModule):
    """The same batch at every step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        layout = self.trainer.strategy.pipeline_layout
        batch = zoo.batch(zoo.KNOWN[self.name], False, layout)
        return DataLoader([batch] * STEPS, batch_size=None)

    val_dataloader = train_dataloader


def _train(rank: int, folder: Path, names: list[str], distributed: bool) -> dict[str, dict[str, torch.Tensor]]:
    trained = {}
    for name in names:
        model = zoo.KNOWN[name]
        module = MultimodalLM.from_pretrained(str(folder / name), model.attention, learning_rate=1e-2)
        strategy = {"save_distributed_checkpoint": distributed, "partition": PARTITIONS.get(name, "even")}
        trainer = pipeline_trainer(2, strategy, max_steps=STEPS, limit_val_batches=1)
        trainer.fit(module, ZooData(name))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        trained[name] = {n: p.detach().clone() for n, p in module.named_parameters()}
    return trained


def _save(name: str, folder: Path) -> None:
    zoo.save(name, folder)
    (folder / name / "preprocessor_config.json").write_text('{"kept": true}')


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Runs with checkpoints of either kind: folder, and weights of each rank by family."""
    runs = {}
    for kind, names in (("directory", list(zoo.MODELS)), ("file", ["qwen3_vl"])):
        folder = tmp_path_factory.mktemp(kind)
        for name in names:
            _save(name, folder)
        runs[kind] = folder, on_ranks(2, _train, folder, names, kind == "directory")
    return runs


def test_a_config_can_start_from_a_folder(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    model = {
        "class_path": "bigmac_lightning.models.MultimodalLM.from_pretrained",
        "init_args": {"path": str(tmp_path / "llama"), "freeze": ["llm.model.embed_tokens"], "schedule": "constant"},
    }
    data = {"class_path": "tests.cli.test_export.ZooData", "init_args": {"name": "llama"}}
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": "bigmac", "max_steps": 2, "logger": False}
    trainer |= {"default_root_dir": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "model": model, "data": data}))
    bigmac(2, tmp_path, "fit", "--config", str(tmp_path / "config.json"), "--ckpt_path", "auto")  # there is none
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    export = ["bigmac", "export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    done = run(export, tmp_path)
    assert done.returncode == 0
    assert "a Hugging Face folder" in done.stdout
    assert keys(tmp_path / "out") == keys(tmp_path / "llama")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere.ckpt", "--output", "out"], "there is no checkpoint at nowhere.ckpt"),
        (["--checkpoint", "other.ckpt", "--output", "out"], "does not say which Hugging Face model it is of"),
        (["--checkpoint", "part.ckpt", "--output", "out"], "not a whole LlamaForCausalLM: 47 tensors are missing"),
        (["--checkpoint", "part.ckpt", "--output", "."], ". is not an empty folder: give --output a new one"),
        (["--checkpoint", "part.ckpt", "--output", "out", "--source", "no"], "there is no folder no to copy"),
    ],
)
def test_what_cannot_be_exported(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    config = zoo.MODELS["llama"].config().to_dict()
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, "other.ckpt")
    noted = {"config": config, "source": None, "lora": {}}
    torch.save({"state_dict": {"llm.model.norm.weight": torch.zeros(32)}, "hugging_face": noted}, "part.ckpt")
    assert export_command.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_config_with_an_infinite_limit(tmp_path: Path) -> None:
    """JSON has no such number, so the library writes a dict for it."""
    module = MultimodalLM(HFDecoder(tiny.tiny_config("nemotron_h", output_router_logits=False)))
    module.configure_model()
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    export(module.state_dict(), checkpoint["hugging_face"]["config"], None, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").time_step_limit == [0.0, float("inf")]


def test_hostile_sources_and_damage(tmp_path: Path) -> None:
    """A checkpoint names the folder that is copied, and may come from a stranger."""
    zoo.save("llama", tmp_path)
    model, config = zoo.load("llama", tmp_path), zoo.MODELS["llama"].config().to_dict()
    state = {f"llm.{name}": tensor for name, tensor in model.state_dict().items()}
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    path, out = str(tmp_path / "a.ckpt"), str(tmp_path / "out")

    def save(source: str) -> None:
        noted = {"config": config, "source": str(tmp_path / source), "lora": {}}
        torch.save({"state_dict": state, "hugging_face": noted}, path)

    save("secret")
    with pytest.raises(ValueError, match=r"names the folder .*secret to copy .* no config\.json of model_type 'llama'"):
        export_command.export_checkpoint(path, out)
    save("llama")
    (tmp_path / "llama" / "notes").symlink_to("../secret/key")
    with pytest.raises(ValueError, match=r"notes is a link to .*key, out of the folder"):
        export_command.export_checkpoint(path, out)
    (tmp_path / "llama" / "notes").unlink()
    whole = Path(path).read_bytes()
    weight = state["llm.model.norm.weight"].numpy().tobytes()
    at = whole.index(weight)
    Path(path).write_bytes(whole[:at] + bytes(4) + whole[at + 4 :])  # the same size
    with pytest.raises(ValueError, match=r"is not whole: .* is damaged"):
        export_command.export_checkpoint(path, out)
    assert not (tmp_path / "out").exists()
    Path(path).write_bytes(whole)
    export_command.export_checkpoint(path, out)


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(("kind", "name"), [*(("directory", name) for name in zoo.MODELS), ("file", "qwen3_vl")])
def test_round_trip(kind: str, name: str, trained: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, ranks = trained[kind]
    assert export_command.main(["--checkpoint", str(folder / f"{name}.ckpt"), "--output", str(tmp_path / name)]) == 0
    exported, start = zoo.load(name, tmp_path), zoo.load(name, folder)
    found, before = dict(exported.named_parameters()), dict(start.named_parameters())
    moved = set()
    for full_name, weight in (pair for rank in ranks for pair in rank[name].items()):
        short = full_name.removeprefix("llm.").removeprefix("encoders.image.")
        short = short if short in found else exported.all_tied_weights_keys[short]
        assert torch.equal(found[short], weight), short
        if not torch.equal(before[short], weight):
            moved.add(short)
    assert len(moved) > 0.5 * len(found)
    assert keys(tmp_path / name) == keys(folder / name)
    assert json.loads((tmp_path / name / "preprocessor_config.json").read_text()) == {"kept": True}
    # ... and the module's losses are those of the exported model
    module = MultimodalLM.from_pretrained(str(tmp_path / name), zoo.KNOWN[name].attention)
    module.configure_model()
    with torch.no_grad():
        again = module.pipeline(zoo.batch(zoo.KNOWN[name], False, zoo.PipelineLayout())).loss
        assert torch.allclose(again, zoo.reference_loss(exported, zoo.KNOWN[name], False), rtol=1e-6)
    # ... and another training starts from it
    started = MultimodalLM.from_pretrained(
        str(folder / name), zoo.KNOWN[name].attention, init_from=str(tmp_path / name)
    )
    started.configure_model()
    for full_name, weight in module.state_dict().items():
        assert torch.equal(started.state_dict()[full_name], weight), full_name


@pytest.mark.wide
@pytest.mark.parametrize("name", more_families.MORE)
def test_round_trip_of_more_families(name: str, tmp_path: Path) -> None:
    _save(name, tmp_path)
    ranks = on_ranks(2, _train, tmp_path, [name], True)
    test_round_trip("directory", name, {"directory": (tmp_path, ranks)}, tmp_path / "exported")
