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


def test_a_run_in_a_bucket(server: None, tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="s3://shards/out is remote, but export writes into a local folder"):
        export_command.export_checkpoint(checkpoint, "s3://shards/out")
