"""docs/own_parts.md: its parts train as in one process, and its files run as they are printed, also on two nodes."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmac_lightning import ShardingOptions
from bigmac_lightning.commands import compare, export, plan
from bigmac_lightning.models import MultimodalLM
from tests.blocks import ROOT, blocks_of
from tests.cli.checkpoints import write_conversations
from tests.cli.commands import BIN
from tests.datamodules.processors import write_model
from tests.ranks import free_port
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

FILES = {block.title: block.text for block in blocks_of("docs/own_parts.md") if block.title}
MODULES = ("waves", "wave_encoder", "wave_generator", "small_llm", "wave_module")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The files of the page in the current folder, where Python finds them."""
    for title, text in FILES.items():
        (tmp_path / title).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def _parts() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from small_llm import SmallLLM
    from wave_encoder import WaveEncoder
    from wave_generator import WaveGenerator

    torch.manual_seed(0)
    return SmallLLM(), {"wave": WaveEncoder(64)}, {"wave": WaveGenerator(64)}


def _trained(trainer: Any, own_step: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    from wave_module import WaveModule
    from waves import WavesDataModule

    module = WaveModule(*_parts()) if own_step else MultimodalLM(*_parts(), learning_rate=3e-3)
    trainer.fit(module, WavesDataModule(240))
    return weights(module), {name: float(value) for name, value in trainer.callback_metrics.items()}


def _on_rank(rank: int, world: int, own_step: bool, options: dict[str, Any]) -> Any:
    return _trained(pipeline_trainer(world, options, max_epochs=1), own_step)


@pytest.mark.parametrize(
    ("world", "own_step", "options"),
    [
        (2, False, {"backbone": "chunks.json"}),
        (3, True, {"policy": "filled", "backbone": "zb1p"}),
        (2, True, {"sharding": ShardingOptions(encoders="fsdp", generators="fsdp")}),
    ],
    ids=["own-backbone", "own-step-filled-zb1p", "own-step-fsdp"],
)
def test_the_parts_train_as_in_one_process(world: int, own_step: bool, options: dict[str, Any]) -> None:
    """Weights after ten steps, of every rank, and what is logged. (AdamW makes steps of rounding errors of biases of
    keys, whose gradients are 0, so weights are compared after SGD alone.)"""
    exec(FILES["chunks.py"], {})
    whole, logged = _trained(plain_trainer(max_epochs=1), own_step)
    for part, said in on_ranks(world, _on_rank, world, own_step, options):
        if own_step:
            assert_close(part, whole, 1e-4)
        assert said == pytest.approx(logged, rel=1e-4)
    assert {"train/text", "train/wave"} <= logged.keys()


def test_a_backbone() -> None:
    """The commands of the page."""
    exec(FILES["chunks.py"], {})
    lines = [line for block in blocks_of("docs/own_parts.md") if block.kind == "bash" for line in block.commands]
    commands = [line.split() for line in lines if "chunks.json" in line]
    assert [command[:2] for command in commands] == [["bigmac", "plan"], ["bigmac", "compare"]]
    for _, name, *options in commands:
        assert {"plan": plan, "compare": compare}[name].main(options) == 0


def _train_on_node(rank: int) -> Any:
    """`train.py` in a process of its own node, as torchrun starts it."""
    os.environ |= {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": str(rank), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(FILES["train.py"], "train.py", "exec"), names)
    trainer = names["trainer"]
    return trainer.num_nodes, trainer.world_size, float(trainer.callback_metrics["val/accuracy"])


def test_it_runs_on_two_nodes() -> None:
    """With one process each; it learns to tell all waves apart."""
    for nodes, processes, accuracy in on_ranks(2, _train_on_node):
        assert (nodes, processes) == (2, 2)
        assert accuracy > 0.9


@pytest.mark.wide
def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """The command of the page, twice at the same time, with this machine as the head."""
    [command] = [line for block in blocks_of("docs/own_parts.md") for line in block.commands if "torchrun" in line]
    words = command.replace("node-a:29400", f"localhost:{free_port()}").split()
    assert words[0] == "torchrun"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"}
    nodes = [
        subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=200)[0] for node in nodes]
    print(*said)
    assert [node.returncode for node in nodes] == [0, 0]
    assert "".join(said).count("`Trainer.fit` stopped: `max_epochs=4` reached") == 1


def _finetune(rank: int) -> None:
    warnings.simplefilter("default")  # there are fewer batches than the Trainer logs at
    exec(compile(FILES["finetune.py"], "finetune.py", "exec"), {"__name__": "__main__"})


def test_a_hugging_face_model(tmp_path: Path) -> None:
    """With a tiny model in the place of the one that the page names."""
    (tmp_path / "checkpoints").mkdir()
    write_model("qwen3_vl", tmp_path / "checkpoints").rename(tmp_path / "checkpoints" / "Qwen3-VL-4B-Instruct")
    write_conversations(tmp_path / "data" / "train.jsonl", 12)
    on_ranks(2, _finetune)
    assert (tmp_path / "finetuned.ckpt").exists()
    [command] = re.findall(r"`(bigmac export [^`]*)`", (ROOT / "docs" / "own_parts.md").read_text())
    assert export.main(command.split()[2:]) == 0
    assert (tmp_path / "OUT" / "model.safetensors").exists()
