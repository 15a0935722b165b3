"""A run of the command line in a bucket: its config, logs, pictures and checkpoints, loaded and exported from there."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import bigmac_lightning
from bigmac_lightning.checkpoints.remote import RemotePath
from bigmac_lightning.commands import export as export_command
from bigmac_lightning.loaded_run import _Reader
from tests.cli.commands import bigmac
from tests.cli.test_chat import CONFIGS, SHORT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser


def test_a_run_in_a_bucket(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = "s3://shards/runs/digits/version_0"
    place = ("--trainer.logger.init_args.save_dir=s3://shards/runs", *SHORT)
    said = bigmac(2, tmp_path, "fit", "--config", str(CONFIGS / "digits.yaml"), *place)
    assert f"{run}/checkpoints/epoch0-accuracy" in said
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    names = {name.removeprefix("shards/runs/digits/version_0/") for name in system.find(run)}
    assert {"config.yaml", "samples.png", "timeline.png", "timeline.html", "trace.json"} < names
    assert not (tmp_path / "s3:").exists(), "an address was taken for a path"
    loaded = bigmac_lightning.load(run, device="cpu")
    assert isinstance(loaded.checkpoint, RemotePath)
    assert loaded.draw("draw a 3 :")[0].size == (8, 8)
    checkpoint, state = str(loaded.checkpoint.parent), loaded.module.state_dict()
    fresh: Any = _Reader.of(RemotePath(f"{run}/config.yaml"), None).model
    fresh.init_from = {"": checkpoint}
    fresh.configure_model()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())
    export_command.export_checkpoint(checkpoint, str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    _export_into_a_bucket(checkpoint, tmp_path / "out")
    _start_from_a_bucket("s3://shards/out", tmp_path, state)


def _export_into_a_bucket(checkpoint: str, local: Path) -> None:
    """The same files as on the disk, and the config last: where the upload ends before it, there is no model."""
    remote, system = "s3://shards/out", fsspec.filesystem("s3", skip_instance_cache=True)
    upload, uploaded = RemotePath.upload, list[str]()

    def fails_at_the_last(place: RemotePath, file: Path) -> None:
        if place.name == "config.json" and place.parent == RemotePath(remote):
            raise OSError("no room")
        upload(place, file)

    def noted(place: RemotePath, file: Path) -> None:
        uploaded.append(place.name)
        upload(place, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemotePath, "upload", fails_at_the_last)
        with pytest.raises(OSError, match="no room"):
            export_command.export_checkpoint(checkpoint, remote)
        assert not system.exists(f"{remote}/config.json")
        system.rm(remote, recursive=True)
        patch.setattr(RemotePath, "upload", noted)
        export_command.export_checkpoint(checkpoint, remote)
    assert uploaded[-1] == "config.json"
    system.invalidate_cache()
    files = {str(path.relative_to(local)): path for path in local.rglob("*") if path.is_file()}
    assert {name.removeprefix("shards/out/") for name in system.find(remote)} == files.keys()
    assert all(system.cat_file(f"{remote}/{name}") == path.read_bytes() for name, path in files.items())
    with pytest.raises(ValueError, match="s3://shards/out is there already: give --output a new folder"):
        export_command.export_checkpoint(checkpoint, remote)


def _start_from_a_bucket(folder: str, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """All ranks of a machine read the same copy."""
    still = ("--model.init_args.learning_rate=0.0", "--model.init_args.weight_decay=0.0", *SHORT)
    place = (f"--model.init_args.init_from={folder}", f"--trainer.logger.init_args.save_dir={tmp_path / 'again'}")
    bigmac(2, tmp_path, "fit", "--config", str(CONFIGS / "digits.yaml"), *place, *still)
    kept = tmp_path / "home" / ".cache" / "bigmac_lightning" / "folders"
    [copy] = (path for path in kept.iterdir() if path.is_dir())
    assert (copy / "model.safetensors").is_file()
    for started in (bigmac_lightning.load(folder), bigmac_lightning.load(tmp_path / "again" / "digits" / "version_0")):
        found = started.module.state_dict()
        assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in found.items())
    assert [path for path in kept.iterdir() if path.is_dir()] == [copy]
