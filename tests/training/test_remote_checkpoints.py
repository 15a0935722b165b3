"""Checkpoints on a server that speaks S3, and in other file systems of fsspec, are what they are on a disk."""

import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bigmac_lightning.callbacks import PipelineMonitor, PreemptionCheckpoint
from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.checkpoints.remote import RemotePath, at
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.training import writing
from tests.toy import ToyData, ToyModule
from tests.training.test_saving import _contents, _write
from tests.training.trainers import on_ranks, pipeline_trainer, weights

STEPS = 3


@pytest.fixture
def bucket(server: None) -> Iterator[str]:
    """The address of an empty bucket."""
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.mkdir("runs")
    yield "s3://runs"
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.rm("runs", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def _names(address: str) -> list[str]:
    """All files below an address, in whatever folders."""
    system, path = fsspec.core.url_to_fs(address)
    system.invalidate_cache()
    return sorted(name.removeprefix(path).lstrip("/") for name in system.find(path))


def _fit(
    rank: int, folder: str, world: int, strategy: dict[str, Any], saver: dict[str, Any], ckpt_path: str | None
) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # Lightning's, of folders that are not empty
    module = ToyModule(tied=True)
    callback = ModelCheckpoint(folder, every_n_train_steps=1, **saver)
    trainer = pipeline_trainer(
        world, strategy, max_steps=STEPS, callbacks=[callback], enable_checkpointing=True, limit_val_batches=0
    )
    trainer.fit(module, ToyData(steps=STEPS), ckpt_path=ckpt_path)
    losses = [float(loss) for loss in module.losses]
    strategy_: Any = trainer.strategy
    repeats = strategy_._repeating._kinds is not None  # so that later saves are fast
    return {"losses": losses, "weights": weights(module), "from": str(trainer.ckpt_path), "repeats": repeats}


def _same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_saved_and_resumed_as_on_a_disk(bucket: str, tmp_path: Path) -> None:
    """Also by other ranks, and in the background; what an interrupted upload has left is not taken."""
    saver = {"save_top_k": -1}
    for where, strategy in ((str(tmp_path / "a"), {}), (f"{bucket}/a", {}), (f"{bucket}/b", {"async_save": True})):
        assert all(one["repeats"] for one in on_ranks(2, _fit, where, 2, strategy, saver, None))
    local = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(local) == STEPS
    for name in local:
        for remote in (f"{bucket}/a/{name}", f"{bucket}/b/{name}"):
            assert _same(_contents(at(remote)), _contents(tmp_path / "a" / name)), remote
    once = ToyModule.load_from_checkpoint(f"{bucket}/a/{local[1]}", tied=True).state_dict()
    assert _same(once, ToyModule.load_from_checkpoint(tmp_path / "a" / local[1], tied=True).state_dict())
    parts = {f"{name}/save-1/{file.name}" for name in local for file in (tmp_path / "a" / name).iterdir()}
    assert set(_names(f"{bucket}/a")) == set(_names(f"{bucket}/b")) == parts
    RemotePath(f"{bucket}/a/epoch=0-step=3.ckpt/save-1/{marker.MARKER}").unlink()
    newest = f"{bucket}/a/epoch=0-step=2.ckpt/save-1"
    for world in (2, 1):
        there = on_ranks(world, _fit, f"{bucket}/a", world, {}, {"save_top_k": 0}, "auto")
        here = on_ranks(world, _fit, str(tmp_path / "c"), world, {}, {"save_top_k": 0}, f"{tmp_path}/a/{local[1]}")
        for one, other in zip(there, here, strict=True):
            assert one["from"] == newest
            assert len(one["losses"]) == 1
            assert one["losses"] == other["losses"]
            assert _same(one["weights"], other["weights"])


@pytest.mark.parametrize("distributed", [True, False])
def test_older_checkpoints_are_deleted_and_nothing_else(distributed: bool, bucket: str) -> None:
    own = f"{bucket}/a/epoch=0-step=1.ckpt/notes.txt"
    fsspec.core.url_to_fs(own)[0].pipe(own, b"kept")
    strategy = {"save_distributed_checkpoint": distributed}
    for save_last in (False, True):
        on_ranks(2, _fit, f"{bucket}/a", 2, strategy, {"save_last": save_last, "enable_version_counter": False}, None)
        expected = {"epoch=0-step=3.ckpt", *(["last.ckpt"] if save_last else [])}
        found = _names(f"{bucket}/a")
        assert "epoch=0-step=1.ckpt/notes.txt" in found
        kept = {name.split("/")[0] for name in found} - {"epoch=0-step=1.ckpt"}
        assert kept == expected
    (result,) = {one["from"] for one in on_ranks(2, _fit, f"{bucket}/a", 2, strategy, {"save_top_k": 0}, "last")}
    assert result.startswith(f"{bucket}/a/last.ckpt")


# -- a save that ends --------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[RemotePath]:
    """An empty folder in this process's memory."""
    yield RemotePath("memory://runs")
    fsspec.filesystem("memory").rm("/runs", recursive=True)


def _value(path: RemotePath) -> float:
    place = files.present(path)
    assert not marker.problems(place)
    stored = CheckpointWeights(path)
    assert stored.rest()["more"]["value"] == stored.read()["weight"][0]
    return float(stored.read()["weight"][0])


class _KilledError(BaseException):
    """No code that cleans up after errors sees it... but for `finally`."""


def _interrupted_at(
    number: int, monkeypatch: pytest.MonkeyPatch, error: type, once: bool, work: Callable[[], None]
) -> bool:
    """Do something in which the nth change in a remote file system fails, and all later ones; whether it got so far.

    Args:
        once: whether later ones succeed.
    """
    left = number

    def ending(change: Any) -> Any:
        def changed(*args: Any) -> None:
            nonlocal left
            left -= 1
            if left == -1 or (left < 0 and not once):
                raise error("ended")
            change(*args)

        return changed

    with monkeypatch.context() as patched:
        for name in ("upload", "unlink", "rmdir"):
            patched.setattr(RemotePath, name, ending(getattr(RemotePath, name)))
        try:
            work()
        except error:
            return True
    return left < 0


@pytest.mark.parametrize(("error", "once"), [(_KilledError, False), (OSError, False), (OSError, True)])
def test_a_whole_checkpoint_is_found_after_any_failure(
    error: type, once: bool, memory: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing.without_group():
        for number in range(100):
            path = memory / f"{number}.ckpt"
            _write(path, 1.0)
            ended = _interrupted_at(number, monkeypatch, error, once, lambda path=path: _write(path, 2.0))
            assert _value(path) == 2.0 or ended
            _write(path, 3.0)
            assert _value(path) == 3.0
            assert len(list(path.iterdir())) == 1, "older ones take room"
            if not ended:
                break
        assert number > 6


def test_a_checkpoint_is_gone_at_once(memory: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing.without_group():
        for number in range(20):
            path = memory / f"{number}.ckpt"
            _write(path, 1.0)
            ended = _interrupted_at(number, monkeypatch, _KilledError, False, lambda path=path: files.remove(path))
            with suppress(FileNotFoundError):
                assert _value(path) == 1.0
            if not ended:
                break
        assert number > 3
        assert not path.exists()


def test_damage_is_found(memory: RemotePath) -> None:
    path = memory / "x.ckpt"
    with writing.without_group():
        _write(path, 1.0)
    file = path / "save-1" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    fsspec.filesystem("memory").pipe(file.address, bytes(content))
    with pytest.raises(ValueError, match=rf"{path}/save-1 is not whole: {file} is damaged: its CRC-32"):
        CheckpointWeights(path).check()
    told = (path / "save-1" / marker.MARKER).read_text()
    for name in ("../x", "a::memory://b", ".."):
        changed = told.replace("__0_0.distcp", name).encode()
        fsspec.filesystem("memory").pipe(f"{path}/save-1/{marker.MARKER}", changed)
        assert re.search("is not the name of a file in memory", marker.problems(files.present(path))[0])


class _Lost(Callback):
    """From a step on, one rank cannot reach the server."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            trainer.strategy._background.wait()
            os.environ["AWS_SECRET_ACCESS_KEY"] = ""
            os.environ["AWS_ACCESS_KEY_ID"] = ""
            s3fs.S3FileSystem.clear_instance_cache()


def _lose(rank: int, folder: str, strategy: dict[str, Any]) -> str:
    warnings.simplefilter("ignore")
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1)
    trainer = pipeline_trainer(
        2, strategy, max_steps=STEPS, callbacks=[_Lost(), saver], enable_checkpointing=True, limit_val_batches=0
    )
    try:
        trainer.fit(ToyModule(tied=True), ToyData(steps=STEPS))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_an_upload_that_fails_ends_all_ranks_with_one_error(bucket: str) -> None:
    error, other = on_ranks(2, _lose, f"{bucket}/a", {"async_save": True})
    assert error == other
    assert f"cannot save the checkpoint {bucket}/a/epoch=0-step=3.ckpt: rank 1: " in error
    assert {name.split("/")[0] for name in _names(f"{bucket}/a")} == {"epoch=0-step=2.ckpt"}
    assert not marker.problems(files.present(at(f"{bucket}/a/epoch=0-step=2.ckpt")))


def _places(rank: int, folder: str, changes: dict[str, str]) -> str:
    warnings.simplefilter("ignore")
    os.environ.update(changes)
    s3fs.S3FileSystem.clear_instance_cache()
    trainer = pipeline_trainer(2, max_steps=1, callbacks=[ModelCheckpoint(folder)], enable_checkpointing=True)
    try:
        trainer.fit(ToyModule(tied=True), ToyData(steps=1))
    except Exception as error:
        return f"{trainer.global_step} {type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("folder", "changes", "said"),
    [
        ("s3://none/a", {}, "checkpoints cannot be saved in s3://none/a: .*bucket does not exist"),
        (
            "s3://runs/a",
            {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"},
            "checkpoints cannot be saved in s3://runs/a: NoCredentialsError: Unable to locate credentials",
        ),
        ("memory://a", {}, "checkpoints cannot be saved in memory://a: .tried-by-rank-1 was written, and is not there"),
        ("simplecache::s3://runs/a", {}, "simplecache::s3://runs/a goes through several file systems"),
    ],
)
def test_where_nothing_can_be_saved(folder: str, changes: dict[str, str], said: str, bucket: str) -> None:
    """The run ends before its first step, with the same line on all ranks."""
    error, other = on_ranks(2, _places, folder, changes)
    assert re.match(rf"0 \w+: {said}", error), error
    assert other == error
    assert not _names(bucket)


def test_an_address_is_no_path() -> None:
    with pytest.raises(ValueError, match="s3:/runs/a was an address, of which a Path has dropped a slash"):
        at(Path("s3://runs/a"))
    assert at("s3://runs/a/") == RemotePath("s3://runs/a")
    assert at("s3://runs/a") / "b" == RemotePath("s3://runs/a/b")
    assert [str(folder) for folder in RemotePath("s3://runs/a/b").parents] == ["s3://runs/a", "s3://runs"]
    assert at("runs/a") == Path("runs/a")


def _log(rank: int, folder: str, ckpt_path: str | None) -> tuple[str, str, int]:
    warnings.simplefilter("ignore")
    preempted, monitor, module = PreemptionCheckpoint(), PipelineMonitor(trace_step=0), ToyModule(tied=True)
    trainer = pipeline_trainer(
        2,
        max_steps=STEPS,
        callbacks=[monitor, preempted, *([] if ckpt_path else [_Signal()])],
        default_root_dir=folder,
        logger=TensorBoardLogger(folder),
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    with suppress(SIGTERMException):
        trainer.fit(module, ToyData(steps=STEPS), ckpt_path=ckpt_path)
    return str(preempted.path), str(trainer.ckpt_path), len(module.losses)


class _Signal(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_logs_pictures_and_a_preempted_run(bucket: str) -> None:
    """The second run is another version of the logger, and goes on from the checkpoint of the first."""
    run, (path, _, steps) = f"{bucket}/lightning_logs/version_0", on_ranks(2, _log, bucket, None)[1]
    assert path == f"{run}/checkpoints/preempted.ckpt"
    assert steps < STEPS
    kept = {name.partition("/")[0] for name in _names(run)}
    assert {"trace.json", "timeline.html", "timeline.png", "hparams.yaml", "checkpoints"} < kept
    (events,) = (name for name in kept if name.startswith("events"))
    assert RemotePath(f"{run}/{events}").stat().st_size > 1000
    for none, found, more in on_ranks(2, _log, bucket, "auto"):
        assert (none, found) == ("None", f"{path}/save-1")
        assert steps + more == STEPS
