"""Saves that fail, and saves in the background."""

import os
import resource
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from bigmac_lightning import ShardingOptions
from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.checkpoints.parts import Names
from bigmac_lightning.checkpoints.reading import DirectoryCheckpointIO
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.training import saving, writing
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer

STEPS = 6
TOUCHING = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
"""Audit events of Python that come right before a file system is changed."""


def _write(path: Path, value: float) -> None:
    """A checkpoint of one process."""
    weight = torch.full((4,), value)
    checkpoint = {"state_dict": {"weight": weight}, "global_step": 1, "more": {"value": value}}
    names = Names(frozenset({"weight"}), frozenset(), {})
    writing.save_directory(writing.Contents.of(checkpoint, names, 0, whole=False), path)


def _value(path: Path) -> float:
    place = files.present(path)
    assert not marker.problems(place)
    stored = CheckpointWeights(path)
    assert stored.rest()["more"]["value"] == stored.read()["weight"][0]
    return float(stored.read()["weight"][0])


def _interrupted_at(number: int, folder: Path, work: Callable[[], None], end: Callable[[], None]) -> bool:
    """Do something in a process in which the nth access to a file in the folder ends, and all later ones; whether it
    got so far."""
    if (child := os.fork()) == 0:
        left = number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in TOUCHING and str(folder) in str(arguments[0]):
                left -= 1
                if left < 0:
                    end()

        sys.addaudithook(hook)
        try:
            work()
        except Exception:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def _full() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("older", "end"),
    [
        pytest.param(True, lambda: os._exit(1), id="older-killed"),
        pytest.param(False, _full, id="first-error"),
        pytest.param(True, _full, id="older-error", marks=pytest.mark.wide),
        pytest.param(False, lambda: os._exit(1), id="first-killed", marks=pytest.mark.wide),
    ],
)
def test_a_whole_checkpoint_is_found_after_any_failure(older: bool, end: Callable[[], None], tmp_path: Path) -> None:
    with writing.without_group():
        _write(tmp_path / "template", 1.0)
        for number in range(200):
            folder = tmp_path / str(number)
            folder.mkdir()
            path = folder / "last.ckpt"
            if older:
                shutil.copytree(tmp_path / "template", path)
            if not _interrupted_at(number, folder, lambda path=path: _write(path, 2.0), end):
                break
            if older:
                assert _value(path) in (1.0, 2.0)
            else:
                assert not any(marker.is_whole(place) for place in folder.iterdir()) or _value(path) == 2.0
            assert all(not marker.problems(place) for place in folder.glob("*.ckpt"))
        assert number > 8
        assert _value(path) == 2.0
        assert [place.name for place in folder.iterdir()] == ["last.ckpt"]


def test_the_next_save_keeps_the_only_checkpoint_until_it_is_whole(tmp_path: Path) -> None:
    """It was written, and not yet put in place, when a process ended: the next save deleted it first."""
    with writing.without_group():
        _write(tmp_path / "last.ckpt.unfinished", 1.0)
        assert _value(tmp_path / "last.ckpt") == 1.0
        assert _interrupted_at(4, tmp_path, lambda: _write(tmp_path / "last.ckpt", 2.0), lambda: os._exit(1))
        assert _value(tmp_path / "last.ckpt") == 1.0


# -- a run whose save fails --------------------------------------------------------------------------------------------


class _Fails(Callback):
    """From a step on, one rank cannot write more than some bytes, or the folder is gone."""

    def __init__(self, folder: Path, how: str) -> None:
        self.folder, self.how = folder, how

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 2:
            return
        trainer.strategy._background.wait()
        if self.how == "full" and trainer.global_rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        if self.how == "gone" and trainer.global_rank == 0:
            self.folder.rename(self.folder.with_name("moved"))
            self.folder.write_text("a file")


def _fail(rank: int, folder: Path, how: str, strategy: dict[str, Any]) -> tuple[str, int]:
    warnings.simplefilter("ignore")
    saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1)
    callbacks = [_Fails(folder, how), saver]
    trainer = pipeline_trainer(
        2, strategy, max_steps=STEPS, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0
    )
    try:
        trainer.fit(ToyModule(tied=True), ToyData(steps=STEPS))
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return f"{type(error).__name__}: {error}", trainer.global_step
    return "no error", trainer.global_step


@pytest.mark.parametrize(
    ("how", "strategy"),
    [
        ("full", {}),
        pytest.param("gone", {}, marks=pytest.mark.wide),
        ("gone", {"save_distributed_checkpoint": False}),
        ("full", {"async_save": True}),
        pytest.param("gone", {"async_save": True, "save_distributed_checkpoint": False}, marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_a_save_that_fails_ends_all_ranks_with_one_error(how: str, strategy: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (error, step), other = on_ranks(2, _fail, folder, how, strategy)
    assert other == (error, step)
    path = folder / "epoch=0-step=3.ckpt"
    reason = "rank 1: [Errno 27] File too large" if how == "full" else "[Errno"
    assert error.startswith(f"OSError: cannot save the checkpoint {path}: {reason}") or how == "gone"
    assert f"cannot save the checkpoint {path}: " in error
    assert error.count("cannot save") == 1
    assert step in (3, 4)
    kept = folder.with_name("moved") if how == "gone" else folder
    assert [place.name for place in kept.iterdir()] == ["epoch=0-step=2.ckpt"]  # and nothing that takes room
    assert not marker.problems(kept / "epoch=0-step=2.ckpt")


# -- in the background -------------------------------------------------------------------------------------------------


class _Slow:
    """Writes only after the run has made two more steps, or has ended."""

    def __init__(self) -> None:
        self.steps, self.moved = 0, threading.Condition()
        self.waited: list[str] = []

    def step(self) -> None:
        with self.moved:
            self.steps += 1
            self.moved.notify_all()

    def patch(self) -> None:
        for name in ("save_directory", "save_file"):
            setattr(saving, name, partial(self.save, getattr(writing, name)))

    def save(self, write: Callable[..., None], contents: writing.Contents, path: Any, *others: Any) -> None:
        with self.moved:
            self.moved.wait_for(lambda: self.steps >= contents.step + 2 or self.steps >= STEPS, timeout=20)
            kept = sorted(place.name for place in Path(path).parent.glob("*"))
            self.waited.append(f"{contents.step} at {self.steps}: {kept}")
        write(contents, path, *others)


class _Steps(Callback):
    def __init__(self, slow: _Slow | None) -> None:
        self.slow = slow

    def on_train_batch_end(self, *_: Any) -> None:
        if self.slow is not None:
            self.slow.step()


def _fit(rank: int, folder: Path, strategy: dict[str, Any], slowly: bool, top_k: int) -> list[str]:
    warnings.simplefilter("ignore")
    slow = _Slow() if slowly else None
    if slow is not None:
        slow.patch()
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=top_k)
    trainer = pipeline_trainer(
        2,
        strategy,
        max_steps=STEPS,
        callbacks=[_Steps(slow), saver],
        enable_checkpointing=True,
        limit_val_batches=0,
    )
    trainer.fit(ToyModule(tied=True), ToyData(steps=STEPS))
    return [] if slow is None else slow.waited


SHARDED = ShardingOptions(encoders="fsdp", generators="zero1", stages="zero1")


def _contents(path: Path) -> dict[str, torch.Tensor]:
    """Weights and moments, by name."""
    checkpoint = DirectoryCheckpointIO().load_checkpoint(path)
    (state,) = checkpoint["optimizer_states"]
    moments = {f"{name}.{key}": value for name, some in state["state"].items() for key, value in some.items()}
    return {**checkpoint["state_dict"], **moments}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.wide),
        {"save_distributed_checkpoint": False},
        {"sharding": SHARDED, "pipeline_parallel_size": 1},
    ],
    ids=str,
)
def test_what_is_saved_in_the_background_is_what_is_saved_at_once(options: dict[str, Any], tmp_path: Path) -> None:
    """And not what later steps have made of it."""
    on_ranks(2, _fit, tmp_path / "at-once", options, False, -1)
    on_ranks(2, _fit, tmp_path / "background", {**options, "async_save": True}, True, -1)
    names = [path.name for path in sorted((tmp_path / "at-once").iterdir())]
    assert names == [path.name for path in sorted((tmp_path / "background").iterdir())]
    for name in names:
        one, other = (_contents(tmp_path / kind / name) for kind in ("at-once", "background"))
        assert one.keys() == other.keys()
        assert_close(other, one, 0.0)


def test_training_goes_on_and_the_older_one_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    for waited in on_ranks(2, _fit, tmp_path, {"async_save": True}, True, 1):
        assert waited[0].startswith("2 at 4: []")
        assert waited[1].startswith("4 at 6: ['epoch=0-step=2.ckpt'"), "it was removed before"
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-step=6.ckpt"]
