"""Where a run resumes with `ckpt_path="auto"` and "last"."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core import rank_zero

from bigmac_lightning.checkpoints import marker
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer

STEPS = 3


class Told(logging.Handler):
    """What a run says about `ckpt_path`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        rank_zero.log.addHandler(self)  # Lightning has replaced it by its own

    def emit(self, record: logging.LogRecord) -> None:
        if "ckpt_path=" in record.getMessage():
            self.lines.append(record.getMessage())


def _fit(rank: int, folder: Path, asked: list[str | None], options: dict[str, Any]) -> list[tuple[int, str, list[str]]]:
    """Runs one after another: at which step each begins, the checkpoint, and what it says."""
    results = []
    warnings.simplefilter("ignore")  # Lightning's, of folders that are not empty or have changed
    for ckpt_path in asked:
        told = Told()
        saver = ModelCheckpoint(None if "logger" in options else folder, every_n_train_steps=1, save_top_k=-1)
        logger = CSVLogger(folder, "runs") if "logger" in options else False
        trainer = pipeline_trainer(
            2, max_steps=STEPS, callbacks=[saver], logger=logger, enable_checkpointing=True, limit_val_batches=0
        )
        module = ToyModule(tied=True)
        trainer.fit(module, ToyData(steps=STEPS), ckpt_path=ckpt_path)
        results.append((STEPS - len(module.losses), str(trainer.ckpt_path), told.lines))
    return results


def test_auto_resumes_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    ((first, path, told), _), _ = on_ranks(2, _fit, tmp_path, ["auto", None], {})
    assert (first, path) == (0, "None")
    assert f"there is no whole checkpoint in {tmp_path}" in told[0]
    assert "the run starts anew" in told[0]
    for version in ("", "-v1"):  # of the second run, which began anew, too
        (tmp_path / f"epoch=0-step=3{version}.ckpt" / "__1_0.distcp").unlink()
    (tmp_path / "epoch=0-step=2-v1.ckpt" / marker.MARKER).rename(tmp_path / "kept")
    (tmp_path / "epoch=0-step=2-v1.ckpt").rename(tmp_path / "epoch=0-step=2-v1.ckpt.unfinished")
    newest = tmp_path / "epoch=0-step=1-v1.ckpt"
    for rank, ((start, path, told),) in enumerate(on_ranks(2, _fit, tmp_path, ["auto"], {})):
        assert start == 1
        assert path == str(newest)
        if rank == 0:
            (line,) = told
            assert f"resumes from {newest}; not whole, and skipped" in line
            assert "step=3-v1.ckpt/__1_0.distcp is missing" in line
            assert "step=2-v1.ckpt.unfinished was not written to its end: it has no complete.json" in line


def test_auto_finds_a_complete_checkpoint_that_was_not_put_in_place(tmp_path: Path) -> None:
    on_ranks(2, _fit, tmp_path, [None], {})
    (tmp_path / "epoch=0-step=3.ckpt").rename(tmp_path / "epoch=0-step=3.ckpt.unfinished")
    (tmp_path / "epoch=0-step=1.ckpt").rename(tmp_path / "epoch=0-step=1.replaced.ckpt")
    ((start, path, _),) = on_ranks(2, _fit, tmp_path, ["auto"], {})[0]
    assert (start, path) == (3, str(tmp_path / "epoch=0-step=3.ckpt.unfinished"))


def test_auto_looks_in_all_versions_of_the_logger(tmp_path: Path) -> None:
    _, (start, path, _) = on_ranks(2, _fit, tmp_path, [None, "auto"], {"logger": True})[0]
    assert start == 3
    assert path == str(tmp_path / "runs" / "version_0" / "checkpoints" / "epoch=0-step=3.ckpt")


def _fit_last(rank: int, folder: Path, asked: list[str | None]) -> list[tuple[int, str]]:
    results = []
    for ckpt_path in asked:
        saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        trainer = pipeline_trainer(
            2, max_steps=STEPS, callbacks=[saver], enable_checkpointing=True, limit_val_batches=0
        )
        module = ToyModule(tied=True)
        with warnings.catch_warnings(action="ignore"):  # Lightning's, of a folder that is not empty
            trainer.fit(module, ToyData(steps=STEPS), ckpt_path=ckpt_path)
        results.append((STEPS - len(module.losses), str(trainer.ckpt_path)))
    return results


def test_last_finds_what_an_interrupted_save_has_left(tmp_path: Path) -> None:
    """The survivor was found by nobody, and deleted by the first save of the run that started anew."""
    on_ranks(2, _fit_last, tmp_path, [None])
    for left in ("last.ckpt.unfinished", "last.replaced.ckpt"):
        (tmp_path / "last.ckpt").rename(tmp_path / left)
        ((start, path),) = on_ranks(2, _fit_last, tmp_path, ["last"])[0]
        assert (start, path) == (STEPS, str(tmp_path / left))
        (tmp_path / left).rename(tmp_path / "last.ckpt")


def _evaluate(rank: int, folder: Path) -> str:
    saver = ModelCheckpoint(folder)
    trainer = pipeline_trainer(2, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(ValueError, match="there are no weights to evaluate") as error:
        trainer.validate(ToyModule(tied=True), ToyData(), ckpt_path="auto", verbose=False)
    return str(error.value)


def test_auto_does_not_evaluate_untrained_weights(tmp_path: Path) -> None:
    assert len(set(on_ranks(2, _evaluate, tmp_path))) == 1
