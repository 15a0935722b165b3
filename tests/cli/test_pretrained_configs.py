"""Every config that starts from pretrained models, as it is, but with tiny ones at the paths that it names, on two or
four CPU processes instead of GPUs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.commands import export as export_command
from bigmac_lightning.models import VisionEncoder
from tests.cli.checkpoints import BUFFERS, PEERS, STRATEGY, write_inputs
from tests.cli.commands import bigmac
from tests.cli.test_commands import ALL_CONFIGS, CONFIGS, TINY

PRETRAINED = {path.stem: path for path in ALL_CONFIGS if path not in CONFIGS}
FIRST, SECOND = "siglip_qwen3_projector", "siglip_qwen3"  # two stages of one recipe
SMALL = [
    *TINY,
    "--trainer.accelerator=cpu",
    "--trainer.devices=2",
    "--trainer.num_nodes=1",
    f"{STRATEGY}.pipeline_parallel_size=2",
    "--data.token_budget=256",
    "--data.microbatches=2",
    "--data.num_workers=0",
    "--data.loading.cache_dir=cache",
]


def train(name: str, folder: Path, *more: str) -> None:
    """A few steps and a validation, in a folder with all that the config needs."""
    write_inputs(PRETRAINED[name].read_text(), folder)
    arguments, ranks = [*SMALL, *BUFFERS.get(name, ()), *more], 2
    if name in PEERS:
        ranks = 4
        arguments += ["--trainer.devices=4", *PEERS[name]]
    said = bigmac(ranks, folder, "fit", "--config", str(PRETRAINED[name]), *arguments)
    assert "val/accuracy" in said
    assert "timeline.png" in said
    (trace,) = (folder / "runs" / name).rglob("trace.json")
    spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["tid"] for event in spans} == {0, 1}
    assert {"EF0", "0F0", "1F0", "1B0", "0B0", "EB0"} <= {event["name"] for event in spans}


@pytest.mark.parametrize("name", sorted(PRETRAINED.keys() - {FIRST, SECOND}))
def test_config_trains_and_exports(name: str, tmp_path: Path) -> None:
    train(name, tmp_path)
    arguments = ["--checkpoint", str(tmp_path / "runs" / name / "best.ckpt"), "--output", str(tmp_path / "out")]
    source = next((tmp_path / "checkpoints").iterdir())
    assert export_command.main([*arguments, "--source", str(source)]) == 0
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}


def test_two_stages(tmp_path: Path) -> None:
    """The first one trains the projector alone; the second one starts from its tower and projector and trains all."""
    train(FIRST, tmp_path)
    first = CheckpointWeights(tmp_path / "runs" / FIRST / "projector.ckpt").read()
    folders = {folder.name: str(folder) for folder in (tmp_path / "checkpoints").iterdir()}
    llm, tower = folders["Qwen3-4B-Instruct-2507"], folders["siglip2-so400m-patch16-512"]
    encoder = VisionEncoder(tower, 2560, 2560, merge=2, weights=tower)
    encoder.materialize()
    start = {f"encoders.image.{name}": tensor for name, tensor in encoder.state_dict().items()}
    start |= {f"llm.{name}": tensor for name, tensor in load_file(f"{llm}/model.safetensors").items()}
    start["llm.lm_head.weight"] = start["llm.model.embed_tokens.weight"]  # tied
    assert first.keys() == start.keys()
    moved = {name for name, tensor in first.items() if not torch.equal(tensor, start[name].to(tensor.dtype))}
    assert moved == {name for name in first if ".projector." in name}

    train(SECOND, tmp_path)
    second = CheckpointWeights(tmp_path / "runs" / SECOND / "best.ckpt").read()
    assert second.keys() == first.keys()
    begin = {name: (start if name.startswith("llm.") else first)[name] for name in second}
    change = {name: float((tensor - begin[name]).abs().max()) for name, tensor in second.items()}
    assert max(change.values()) < 1e-5, "three steps of the warm-up"
    assert [name for name, by in change.items() if by == 0] == []
