"""A run with the same arguments as one before, and without `ckpt_path`: the checkpoints of the first one stay."""

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bigmac_lightning.callbacks import PreemptionCheckpoint
from tests.loaders import Places
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer

STEPS = 3


class _Stops(pl.Callback):
    """Gets a signal in each run, after its first batch."""

    told = False

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.told and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)
        self.told = True


class _Data(ToyData):
    """A run can go on within an epoch."""

    def train_dataloader(self) -> Places:
        return Places(range(self.steps), batch_size=1, collate_fn=self.collate)


Table = dict[str, Callable[[Path], dict[str, Any]]]
SAVERS: Table = {
    "no logger": lambda folder: {"default_root_dir": folder, "callbacks": [ModelCheckpoint()]},
    "versions": lambda folder: {"logger": CSVLogger(folder), "callbacks": [ModelCheckpoint()]},
    "one version": lambda folder: {"logger": CSVLogger(folder, version="a"), "callbacks": [ModelCheckpoint()]},
    "best": lambda folder: {"callbacks": [ModelCheckpoint(folder, monitor="val/loss", save_top_k=1)]},
    "one name": lambda folder: {"callbacks": [ModelCheckpoint(folder, "best", every_n_train_steps=1)]},
    "last": lambda folder: {"callbacks": [ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)]},
    "link": lambda folder: {"callbacks": [ModelCheckpoint(folder, save_last="link", every_n_train_steps=1)]},
    "preempted": lambda folder: {"callbacks": [PreemptionCheckpoint(folder), _Stops()], "enable_checkpointing": False},
    "preempted beside others": lambda folder: {
        "callbacks": [ModelCheckpoint(folder, "{step}"), PreemptionCheckpoint(), _Stops()]
    },
}


def _fit(strategy: dict[str, Any], options: dict[str, Any], ckpt_path: str | Path | None = None) -> str | None:
    """Returns: what the run was resumed from."""
    trainer = pipeline_trainer(2, strategy, **{"max_epochs": 1, "enable_checkpointing": True, **options})
    stopped = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Checkpoint directory.*|.*Experiment logs directory.*")
        try:
            trainer.fit(ToyModule(tied=True), _Data(steps=STEPS), ckpt_path=ckpt_path)
        except SIGTERMException:
            stopped = True
    assert stopped == any(isinstance(callback, _Stops) for callback in options["callbacks"])
    return None if trainer.ckpt_path is None else str(trainer.ckpt_path)


def _fit_all(rank: int, folder: Path, strategy: dict[str, Any]) -> None:
    for name, options in SAVERS.items():
        _fit(strategy, options(folder / name))


def _checkpoints(folder: Path) -> dict[str, bytes]:
    """All files of checkpoints in a folder, with what is in them."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".ckpt" in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param({}, id="directories"),
        pytest.param({"save_distributed_checkpoint": False}, id="files", marks=pytest.mark.wide),
        pytest.param({"async_save": True}, id="background"),
    ],
)
def test_the_first_runs_checkpoints_stay(strategy: dict[str, Any], tmp_path: Path) -> None:
    on_ranks(2, _fit_all, tmp_path, strategy)
    first = {name: _checkpoints(tmp_path / name) for name in SAVERS}
    on_ranks(2, _fit_all, tmp_path, strategy)
    for name, before in first.items():
        after = _checkpoints(tmp_path / name)
        assert before, name
        assert len(after) == 2 * len(before), name
        assert {path: after.get(path) == text for path, text in before.items()} == dict.fromkeys(before, True), name


def _stop_and_go_on(rank: int, folder: Path) -> list[str | None]:
    """Runs that are stopped: two new ones, two that go on from the newest checkpoint, and a new one."""
    resumed = []
    for path in (None, None, "auto", "auto", None):
        callbacks = [PreemptionCheckpoint(folder), _Stops()]
        resumed.append(_fit({}, {"callbacks": callbacks, "enable_checkpointing": False, "max_epochs": 9}, path))
    return resumed


def test_a_run_that_goes_on_replaces_its_own(tmp_path: Path) -> None:
    """And not that of the run before, nor is there one more with each time that it is stopped."""
    second = str(tmp_path / "preempted-v1.ckpt")
    assert on_ranks(2, _stop_and_go_on, tmp_path) == [[None, None, second, second, None]] * 2
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["preempted", "preempted-v1", "preempted-v2"]
