"""Checkpoints on the disk: there is a whole one wherever a save is interrupted; every option of ModelCheckpoint."""

import os
import sys
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.training import saving
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 3  # per epoch

# -- a process that dies while it puts a checkpoint in place -----------------------------------------------------------


def write(path: Path, kind: str, content: str) -> None:
    if kind == "file":
        path.write_text(content)
        return
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text(content)


def content(path: Path) -> set[str]:
    return {path.read_text()} if path.is_file() else {(path / name).read_text() for name in ("a", "b")}


def replace(path: Path, kind: str) -> None:
    place = files.unfinished(path)
    write(place, kind, "new")
    files.put(place, path)


def killed_after(lines: int, work: Callable[[], None]) -> bool:
    """Do something in a process that ends after so many lines of files.py and of the standard library's shutil; whether
    it got so far."""
    if (child := os.fork()) == 0:
        left = lines

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal left
            if Path(frame.f_code.co_filename).name not in ("files.py", "shutil.py"):
                return None
            left -= event == "line"
            if left < 0:
                os._exit(1)
            return trace

        sys.settrace(trace)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("before", ["file", "directory", "link"])
@pytest.mark.parametrize("after", ["file", "directory"])
def test_a_whole_checkpoint_is_found_wherever_a_save_ends(before: str, after: str, tmp_path: Path) -> None:
    for lines in range(1000):
        folder = tmp_path / str(lines)
        folder.mkdir()
        path = folder / "last.ckpt"
        if before == "link":
            write(folder / "epoch=1.ckpt", "directory", "old")
            path.symlink_to("epoch=1.ckpt")
        else:
            write(path, before, "old")
        if not killed_after(lines, lambda p=path: replace(p, after)):
            assert content(path) == {"new"}
            assert {p.name for p in folder.iterdir()} == {"last.ckpt", *(["epoch=1.ckpt"] if before == "link" else [])}
            break
        found = content(files.present(path))
        assert found in ({"old"}, {"new"})
        if before == "link":
            assert content(folder / "epoch=1.ckpt") == {"old"}
        # whatever has the ending of a checkpoint, by which Lightning finds the last one, is a whole one
        assert all(content(place) in ({"old"}, {"new"}) for place in folder.glob("*.ckpt"))
        replace(path, after)  # and the next save finds its way
        assert content(files.present(path)) == {"new"}
    assert lines > 5


def test_a_checkpoint_is_gone_at_once(tmp_path: Path) -> None:
    for lines in range(1000):
        path = tmp_path / f"{lines}.ckpt"
        write(path, "directory", "old")
        ended = killed_after(lines, lambda p=path: files.remove(p))
        assert not path.exists() or content(path) == {"old"}
        if not ended:
            break
    assert not list(tmp_path.glob(f"{lines}.*"))


def _interrupted(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    trainer, module = pipeline_trainer(2, max_epochs=1, limit_val_batches=0), ToyModule(tied=True)
    trainer.fit(module, ToyData(steps=1))
    trainer.save_checkpoint(folder / "last.ckpt")
    trainer.strategy.barrier()
    if rank == 0:  # as if another save had ended between its two moves
        (folder / "last.ckpt").rename(folder / "last.replaced.ckpt")
        (folder / "last.ckpt.unfinished").mkdir()
    trainer.strategy.barrier()
    again = ToyModule(tied=True)
    saver = ModelCheckpoint(folder, save_last=True)
    trainer = pipeline_trainer(2, callbacks=[saver], enable_checkpointing=True)
    trainer.validate(again, ToyData(), ckpt_path="last", verbose=False)
    trainer.validate(again, ToyData(), ckpt_path=folder / "last.ckpt", verbose=False)
    assert_close(weights(again), weights(module), 0.0)
    return weights(module)


def test_an_interrupted_save_leaves_the_one_before(tmp_path: Path) -> None:
    results = on_ranks(2, _interrupted, tmp_path)
    every = {name: weight for rank in results for name, weight in rank.items()}
    stored = CheckpointWeights(tmp_path / "last.ckpt").read()
    assert_close({name: stored[name] for name in every}, every, 0.0)


# -- ModelCheckpoint ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "every-n-train-steps": {"every_n_train_steps": 3, "save_top_k": -1},
    "last": {"save_last": True, "monitor": "val/loss", "save_top_k": 2},
    "last-link": {"save_last": "link", "monitor": "val/loss", "mode": "max"},
    "link-without-counter": {"save_last": "link", "filename": "only", "enable_version_counter": False},
    "same-name": {"filename": "only", "enable_version_counter": False},
    "time": {"train_time_interval": timedelta(0), "save_top_k": -1},
    "weights-only": {"save_weights_only": True, "every_n_epochs": 2},
    "train-epoch-end": {"save_on_train_epoch_end": True, "save_top_k": -1},
    "none-but-last": {"save_top_k": 0, "save_last": True},
}


class Kinds(ModelCheckpoint):
    """Names its last checkpoint anew each time, so that the link before is removed."""

    CHECKPOINT_NAME_LAST = "{epoch}-last"


def _save(make_trainer: Callable[..., pl.Trainer], folder: Path, name: str) -> Any:
    kind = Kinds if name == "last-link" else ModelCheckpoint
    saver = kind(folder, **OPTIONS[name])
    trainer = make_trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    module = ToyModule(tied=True)
    trainer.fit(module, ToyData(steps=STEPS))
    trainer.strategy.barrier()
    kept = sorted((path.name, path.is_symlink()) for path in folder.iterdir())
    scores = (
        saver.best_model_score,
        [Path(path).name for path in (saver.best_model_path, saver.last_model_path) if path],
    )
    again = ToyModule(tied=True)
    last = saver.last_model_path or saver.best_model_path
    make_trainer(callbacks=[saver], enable_checkpointing=True).validate(again, ToyData(), ckpt_path=last, verbose=False)
    return kept, scores, weights(again)


def _save_all(rank: int, folder: Path, distributed: bool, names: list[str]) -> dict[str, Any]:
    def make_trainer(**options: Any) -> pl.Trainer:
        return pipeline_trainer(2, {"save_distributed_checkpoint": distributed}, **options)

    return {name: _save(make_trainer, folder / name, name) for name in names}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plain")
    return {name: _save(plain_trainer, folder / name, name) for name in OPTIONS}


@pytest.mark.parametrize(
    ("distributed", "names"),
    [(True, list(OPTIONS)), (False, ["last-link", "same-name", "weights-only"])],
    ids=["directory", "file"],
)
def test_every_option_of_model_checkpoint(distributed: bool, names: list[str], expected: Any, tmp_path: Path) -> None:
    for rank in on_ranks(2, _save_all, tmp_path, distributed, names):
        for name, (kept, scores, reloaded) in rank.items():
            assert kept == expected[name][0], name
            assert scores[1] == expected[name][1][1], name
            if scores[0] is not None:
                assert float(scores[0]) == pytest.approx(float(expected[name][1][0]), rel=1e-4)
            assert_close(reloaded, expected[name][2], 1e-5)


# -- errors ------------------------------------------------------------------------------------------------------------


class _Stops(ToyModule):
    """In the middle of a step, on some ranks."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__(tied=True)
        self.ranks = ranks

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2 and self.global_rank in self.ranks:
            raise RuntimeError("stopped")
        return super().training_step(batch, batch_idx)


def _stop(rank: int, folder: Path, ranks: tuple[int, ...]) -> None:
    saving.PATIENCE = timedelta(seconds=2)
    saver = ModelCheckpoint(folder, save_on_exception=True, save_last=True)
    trainer = pipeline_trainer(2, max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(_Stops(ranks), ToyData(steps=STEPS))


@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["all", "one"])
def test_an_error_on_all_ranks_saves_and_on_one_does_not(ranks: tuple[int, ...], tmp_path: Path) -> None:
    """The other rank would wait for what does not come."""
    with pytest.raises(AssertionError, match="RuntimeError: stopped"):
        on_ranks(2, _stop, tmp_path, ranks, timeout=30)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == ({"epoch=0-step=2.ckpt", "last.ckpt"} if len(ranks) == 2 else set())


def _refused(rank: int, folder: str, plugins: list[Any], distributed: bool) -> str:
    trainer = pipeline_trainer(
        2,
        {"save_distributed_checkpoint": distributed},
        max_epochs=1,
        plugins=plugins,
        callbacks=[ModelCheckpoint(folder)],
        enable_checkpointing=True,
    )
    try:
        trainer.fit(ToyModule(tied=True), ToyData(steps=1))
    except ValueError as error:
        return f"{error} {trainer.global_step}"
    return "no error"


def test_what_directories_cannot_be_written_with(tmp_path: Path) -> None:
    for error in on_ranks(2, _refused, "memory://somewhere", [], True):
        assert "saved in memory://somewhere: .tried-by-rank-" in error, "each process has a memory of its own"
        assert error.endswith(" 0"), "not before training"
    for error in on_ranks(2, _refused, str(tmp_path), [AsyncCheckpointIO()], True):
        assert "AsyncCheckpointIO writes files" in error
        assert error.endswith(" 0"), "not before training"
    for error in on_ranks(2, _refused, str(tmp_path / "files"), [AsyncCheckpointIO()], False):
        assert error == "no error"
    (saved,) = (tmp_path / "files").iterdir()
    assert "llm.layers.3.mix.weight" in torch.load(saved, weights_only=True)["state_dict"]


def test_parts_that_the_system_takes_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`writev` may write less than it is given, and takes 1024 parts at once."""
    parts = [bytes([i % 256]) * (i % 5) for i in range(3000)]
    at_once = os.writev
    monkeypatch.setattr(os, "writev", lambda file, some: at_once(file, [some[0][:2]] if len(some) % 3 else some))
    found = marker.write_parts(tmp_path / "file", parts)
    whole = b"".join(parts)
    assert (tmp_path / "file").read_bytes() == whole
    assert found == marker.Part(len(whole), zlib.crc32(whole))
