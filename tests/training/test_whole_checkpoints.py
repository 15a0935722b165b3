"""Checkpoints that are not whole, hostile or of another kind of model: refused by name on all ranks, or passed over."""

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from bigmac_lightning.checkpoints import marker
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.commands import export as export_command
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 2


def _save(rank: int, folder: Path, kinds: dict[str, bool]) -> None:
    trainer = pipeline_trainer(2, max_epochs=1, limit_val_batches=0)
    trainer.fit(ToyModule(tied=True), ToyData(steps=STEPS))
    for name, distributed in kinds.items():
        trainer.strategy._save_distributed_checkpoint = distributed
        trainer.save_checkpoint(folder / name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a directory and a file of the same run."""
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(2, _save, folder, {"directory.ckpt": True, "file.ckpt": False})
    return folder


def copied(source: Path, target: Path) -> Path:
    if source.is_file():
        target.write_bytes(source.read_bytes())
        return target
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# -- damage ------------------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_weights(file: Path) -> None:
    """Of a zip archive: in a member's contents, as other bytes are only padding."""
    with zipfile.ZipFile(file) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(file.read_bytes())
    name, extra = struct.unpack_from("<HH", content, member.header_offset + 26)
    content[member.header_offset + 30 + name + extra] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    "cut": ("__0_0.distcp", cut, "__0_0.distcp has .* bytes, but .* were written"),
    "flipped": ("__1_0.distcp", flip, "__1_0.distcp is damaged: its CRC-32 is"),
    "metadata": (".metadata", flip, ".metadata is damaged"),
    "no-metadata": (".metadata", Path.unlink, ".metadata is missing"),
    "meta": ("meta.pt", Path.unlink, "meta.pt is missing"),
    "marker": (marker.MARKER, cut, f"{marker.MARKER} is damaged"),
}
OLD: dict[str, tuple[str, Callable[[Path], None], str]] = {  # without a marker
    "missing": ("__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    "cut": ("__0_0.distcp", cut, "__0_0.distcp has .* bytes, but at least .* were written"),
    "no-metadata": (".metadata", Path.unlink, "no such file .*.metadata"),
}
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "file-cut.ckpt is cut off or damaged"),
    "flipped": (flip_weights, "file-flipped.ckpt is damaged"),
}


def _resume(rank: int, paths: list[Path], strategy: dict[str, Any]) -> list[tuple[str, bool]]:
    """The error of each, and whether weights have stayed as they were."""
    fresh = ToyModule(tied=True)
    fresh.configure_model()
    first = weights(fresh)
    found = []
    for path in paths:
        module = ToyModule(tied=True)
        try:
            trainer = pipeline_trainer(2, strategy, max_epochs=1, limit_val_batches=0)
            trainer.fit(module, ToyData(steps=STEPS), ckpt_path=path)
            error = "no error"
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        now = weights(module)
        found.append((error, all(torch.equal(w, first.get(n, first["llm.embedding.weight"])) for n, w in now.items())))
    return found


def test_what_is_not_whole_is_refused_by_name_before_weights_move(saved: Path, tmp_path: Path) -> None:
    expected: dict[Path, str] = {}
    for name, (file, damage, message) in DAMAGES.items():
        path = copied(saved / "directory.ckpt", tmp_path / f"{name}.ckpt")
        damage(path / file)
        expected[path] = message
    for name, (file, damage, message) in OLD.items():
        path = copied(saved / "directory.ckpt", tmp_path / f"old-{name}.ckpt")
        (path / marker.MARKER).unlink()
        damage(path / file)
        expected[path] = message
    for name, (damage, message) in FILES.items():
        path = copied(saved / "file.ckpt", tmp_path / f"file-{name}.ckpt")
        damage(path)
        expected[path] = message
    ranks = on_ranks(2, _resume, list(expected), {})
    assert ranks[0] == ranks[1], "another error on another rank"
    for (error, same), (path, message) in zip(ranks[0], expected.items(), strict=True):
        assert re.search(message, error), error
        assert error.startswith("ValueError: ")
        assert str(path) in error
        assert same, f"{path}: weights have moved"
        with pytest.raises(ValueError, match=message):  # in one process, as `init_from` and `bigmac export` do
            CheckpointWeights(path).check()
        with pytest.raises(ValueError, match=message):  # and as other strategies do
            ToyModule.load_from_checkpoint(path, tied=True)


def _resume_warned(rank: int, path: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert _resume(rank, [path], {})[0][0] == "no error"
    return [str(warning.message) for warning in caught if "complete.json" in str(warning.message)]


def test_a_directory_of_an_earlier_version_loads_with_a_warning(saved: Path, tmp_path: Path) -> None:
    path = copied(saved / "directory.ckpt", tmp_path / "old.ckpt")
    (path / marker.MARKER).unlink()
    for rank, told in enumerate(on_ranks(2, _resume_warned, path)):
        expected = "has no complete.json, as it was saved by an earlier version"
        assert [expected in text for text in told] == ([True] if rank == 0 else [])
    assert_close(CheckpointWeights(path).read(), CheckpointWeights(saved / "file.ckpt").read(), 0.0)


def test_the_marker_names_every_file(saved: Path) -> None:
    told = json.loads((saved / "directory.ckpt" / marker.MARKER).read_text())
    assert (told["step"], told["world"]) == (STEPS, 2)
    assert {*told["files"], marker.MARKER} == {file.name for file in (saved / "directory.ckpt").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt"} == set(told["files"])


# -- hostile files -----------------------------------------------------------------------------------------------------


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, written: Path) -> None:
        self.written = written

    def __reduce__(self) -> Any:
        return open, (str(self.written), "w")


def _in_metadata(path: Path, hostile: Hostile) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = {**metadata.planner_data, "more": hostile}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_meta(path: Path, hostile: Hostile) -> None:
    torch.save({**torch.load(path / "meta.pt"), "more": hostile}, path / "meta.pt")


def _in_shard(path: Path, hostile: Hostile) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    name = "model.llm.layers.0.norm.bias"
    (index,) = (index for index in metadata.storage_data if index.fqn == name)
    torch.save({"more": hostile}, path / "__2_0.distcp")
    place = _StorageInfo("__2_0.distcp", 0, (path / "__2_0.distcp").stat().st_size)
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data = {
        **{i: p for i, p in metadata.storage_data.items() if i != index},
        MetadataIndex(name): place,
    }
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _elsewhere(path: Path, hostile: Hostile) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../file.ckpt"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_file(path: Path, hostile: Hostile) -> None:
    torch.save({**torch.load(path), "more": hostile}, path)


def _in_plain_pickle(path: Path, hostile: Hostile) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {}, "more": hostile}, protocol=2))


HOSTILE: dict[str, tuple[Callable[[Path, Hostile], None], str]] = {
    "metadata": (_in_metadata, r".metadata holds io.open"),
    "meta": (_in_meta, r"meta.pt holds io.open, which could run code.*checkpoint_weights_only=False"),
    "shard": (_in_shard, r"shard.ckpt \(model.llm.layers.0.norm.bias\) holds io.open"),
    "elsewhere": (_elsewhere, r".metadata names the file '../file.ckpt', which is not in the checkpoint's folder"),
    "file": (_in_file, r"file.ckpt holds io.open, which could run code"),
    "pickle": (_in_plain_pickle, r"pickle.ckpt holds io.open, which could run code"),
}


def test_hostile_checkpoints_run_no_code(saved: Path, tmp_path: Path) -> None:
    written, paths = tmp_path / "written", dict[str, Path]()
    for name, (change, _) in HOSTILE.items():
        kind = "file.ckpt" if name in ("file", "pickle") else "directory.ckpt"
        path = paths[name] = copied(saved / kind, tmp_path / f"{name}.ckpt")
        change(path, Hostile(written))
        if path.is_dir():  # who can change a file can change its checksum, too
            parts = {file.name: marker.part_of(file) for file in path.iterdir() if file.name != marker.MARKER}
            marker.write_marker(path, parts, STEPS, 2)
    written.unlink(missing_ok=True)
    for rank in on_ranks(2, _resume, list(paths.values()), {}):
        for (error, _), (name, (_, message)) in zip(rank, HOSTILE.items(), strict=True):
            assert re.search(message, error), (name, error)
    shapes = CheckpointWeights(saved / "directory.ckpt").shapes
    for path in paths.values():

        def initial(path: Path = path) -> None:
            weights = CheckpointWeights(path)
            if wrong := weights.mismatches(shapes):
                raise ValueError(f"{path}: {wrong}")
            weights.read()
            weights.rest()

        def exported(path: Path = path) -> None:
            export_command.export_checkpoint(str(path), str(tmp_path / "out"))

        def resumed(path: Path = path) -> None:
            plain_trainer(max_epochs=1).fit(ToyModule(tied=True), ToyData(steps=STEPS), ckpt_path=path)

        for read in (initial, exported, resumed, lambda path=path: ToyModule.load_from_checkpoint(path, tied=True)):
            with pytest.raises(ValueError, match=path.name):
                read()
    assert not written.exists()
    (error, _), _ = on_ranks(2, _resume, [paths["meta"]], {"checkpoint_weights_only": False})[0] * 2
    assert error == "no error"
    assert written.exists(), "the hostile file is none"


# -- tied weights ------------------------------------------------------------------------------------------------------


def _save_untied(rank: int, folder: Path) -> None:
    trainer = pipeline_trainer(2, max_epochs=1, limit_val_batches=0)
    trainer.fit(ToyModule(tied=False), ToyData(steps=1))
    for name, distributed in {"directory.ckpt": True, "file.ckpt": False}.items():
        trainer.strategy._save_distributed_checkpoint = distributed
        trainer.save_checkpoint(folder / name)


def _resume_tied(rank: int, world: int, paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        try:
            pipeline_trainer(world).validate(ToyModule(tied=True), ToyData(), ckpt_path=path, verbose=False)
            found.append("no error")
        except ValueError as error:
            found.append(str(error))
    return found


def test_untied_weights_are_not_loaded_into_a_tied_model(tmp_path: Path) -> None:
    on_ranks(2, _save_untied, tmp_path)
    paths = [tmp_path / "directory.ckpt", tmp_path / "file.ckpt"]
    message = "has llm.head.weight and llm.embedding.weight as two different weights"
    for world in (1, 2):
        for rank in on_ranks(world, _resume_tied, world, paths):
            assert all(message in error for error in rank), rank
    for path in paths:
        with pytest.raises(ValueError, match=message):
            plain_trainer().validate(ToyModule(tied=True), ToyData(), ckpt_path=path, verbose=False)
        with pytest.raises(ValueError, match=message):
            ToyModule.load_from_checkpoint(path, tied=True)
        with pytest.raises(ValueError, match=message):
            CheckpointWeights(path).check_ties({"llm.head.weight": "llm.embedding.weight"})
