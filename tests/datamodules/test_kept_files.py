"""Kept files that nobody uses any longer are removed, and nothing else."""

import json
import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.datamodules import LoadingOptions, MessagesJSONL, MultimodalDataModule, TextFiles, WebDatasetTars
from bigmac_lightning.datamodules.kept_arrays import NAME, mapped
from bigmac_lightning.datamodules.packing import steps
from bigmac_lightning.datamodules.sources import line_index, tar_index
from bigmac_lightning.unused import DAYS
from tests.datamodules.test_tar_index import _tar


def _aged(path: Path) -> None:
    long_ago = time.time() - (DAYS + 1) * 24 * 3600
    os.utime(path, (long_ago, long_ago))


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_unused_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, record = tmp_path / "kept", json.dumps({"text": "a text"})
    for module in (line_index, tar_index):
        monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(steps, "MANY", 0)
    (tmp_path / "a.jsonl").write_text(f"{record}\n")
    fsspec.filesystem("memory").pipe("/texts/a.txt", b"a text")
    sources = [
        MessagesJSONL(str(tmp_path / "a.jsonl"), index_dir=kept),
        TextFiles("memory://texts/a.txt", index_dir=kept),
        WebDatasetTars(_tar(tmp_path / "a.tar", {"0.json": record.encode()}), index_dir=kept),
    ]
    loading = LoadingOptions(cache_dir=kept)
    data = MultimodalDataModule(sources, processor="bytes", token_budget=64, microbatches=1, loading=loading)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    made = {path for path in kept.iterdir() if path.suffix == ".safetensors"}
    assert {path.name.partition("-")[0] for path in made} > {"lines", "texts", "tars", "bins"}
    assert len(made) == 7
    assert all(NAME.fullmatch(path.name) for path in made)
    others = ["mine.safetensors", "notes.txt", f"tars-{'0' * 32}.safetensors.txt", "folder"]
    for name in others[:-1]:
        (kept / name).write_text("")
    (kept / "folder").mkdir()
    left = kept / f"tars-{'0' * 32}.safetensorsabcd1234.part"
    left.write_text("")
    for path in kept.iterdir():
        _aged(path)
    [tars] = (path for path in made if path.name.startswith("tars"))
    still = mapped(tars, tar_index.ARRAYS)  # it is used now
    (tmp_path / "b.jsonl").write_text(f"{record}\n\n")
    MessagesJSONL(str(tmp_path / "b.jsonl"), index_dir=kept)
    now = _files(kept)
    assert now > {*others, tars.name}
    assert not now & {path.name for path in made - {tars}}
    assert left.name not in now
    assert len([name for name in now if name.endswith(".safetensors") and name not in others]) == 2
    assert np.array_equal(still["tars"], [0, 1])
    assert len(next(iter(data.train_dataloader())).microbatches) == 1, "what it has mapped is still there"


def test_unused_copies_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    system = fsspec.filesystem("memory")
    for name in "abc":
        system.pipe(f"/models/{name}/config.json", b"{}" + name.encode())
    first, second = (Path(local_folder(f"memory://models/{name}")) for name in "ab")
    (first.parent / "mine").mkdir()
    for path in (first, second, first.parent / "mine"):
        _aged(path)
    local_folder("memory://models/b")
    third = local_folder("memory://models/c")
    found = {path.name for path in first.parent.iterdir() if path.is_dir()}
    assert found == {second.name, Path(third).name, "mine"}
