"""A signal to one rank stops all ranks between two batches, where a checkpoint can be saved."""

import multiprocessing as mp
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bigmac_lightning import Batch
from bigmac_lightning.callbacks import PreemptionCheckpoint
from bigmac_lightning.runtime.board import Board
from bigmac_lightning.runtime.lowering import Compute, Message
from bigmac_lightning.runtime.progress import Progress
from bigmac_lightning.runtime.watchdog import TO_END_BY_ITSELF, Watchdog
from bigmac_lightning.schedule.action import Action
from tests.loaders import Places
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer, weights


class _Told(ToyModule):
    """Gets a signal on one rank, in one batch."""

    def __init__(self, number: int, rank: int, batch: int) -> None:
        super().__init__()
        self.number, self.rank, self.batch = number, rank, batch

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if (self.global_rank, batch_idx) == (self.rank, self.batch):
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, batch_idx)


def _stopped(rank: int, number: int, told: int, dp: int, folder: Path) -> tuple[int, bool, Any]:
    callback = PreemptionCheckpoint(folder)
    trainer = pipeline_trainer(2, {"data_parallel_size": dp}, max_epochs=1, callbacks=[callback])
    error = SIGTERMException if number == signal.SIGTERM else SystemExit
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(error) as raised:
        trainer.fit(_Told(number, told, 2), ToyData(steps=8))
    assert not isinstance(raised.value, SIGTERMException) or number == signal.SIGTERM
    assert raised.value.code == {signal.SIGTERM: 143, signal.SIGINT: 1}[signal.Signals(number)], (
        "torchrun starts it again"
    )
    step = trainer.global_step
    if number == signal.SIGTERM:  # Lightning lets ctrl-C do nothing any more, as the process is about to end
        assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    trainer, module = pipeline_trainer(2, {"data_parallel_size": dp}), ToyModule()
    trainer.validate(module, ToyData(), ckpt_path=folder / "preempted.ckpt", verbose=False)
    return step, callback.path == folder / "preempted.ckpt", weights(module)


def _undisturbed(rank: int, dp: int) -> Any:
    trainer, module = pipeline_trainer(2, {"data_parallel_size": dp}, max_steps=4), ToyModule()
    trainer.fit(module, ToyData(steps=8))
    return weights(module)


@pytest.mark.parametrize(
    ("number", "told", "dp"), [(signal.SIGTERM, 1, 1), (signal.SIGINT, 0, 1), (signal.SIGTERM, 1, 2)]
)
def test_all_ranks_stop_together(number: int, told: int, dp: int, tmp_path: Path) -> None:
    expected = on_ranks(2, _undisturbed, dp)
    for rank, (step, exists, found) in enumerate(on_ranks(2, _stopped, number, told, dp, tmp_path)):
        assert step == 4, "the wish of batch 2 travels with batch 3, and is obeyed before batch 4"
        assert exists
        assert all(torch.equal(found[name], value) for name, value in expected[rank].items())


class _ToldInValidation(ToyModule):
    """Gets a signal in the second validation."""

    def __init__(self, told: int | None) -> None:
        super().__init__()
        self.told = told
        self.validated: list[tuple[int, int]] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append((self.global_step, batch_idx))
        if self.told is not None and (self.global_step, batch_idx, self.global_rank) == (4, 1, self.told):
            os.kill(os.getpid(), signal.SIGTERM)
        super().validation_step(batch, batch_idx)


class _Validating(ToyData):
    def train_dataloader(self) -> Any:
        return Places(range(self.steps), batch_size=1, collate_fn=self.collate)

    def val_dataloader(self) -> Any:
        return self.loader(6, first=1000)


def _in_validation(rank: int, told: int | None, options: dict[str, Any], accumulate: int, folder: Path) -> Any:
    """Weights after three epochs, and the batches of validations that were run, by run."""
    path, ran = None, []
    for attempt in range(1 if told is None else 2):
        callback, module = PreemptionCheckpoint(folder), _ToldInValidation(None if attempt else told)
        every = {"accumulate_grad_batches": accumulate, "val_check_interval": 2 * accumulate - 1}
        saving = ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_top_k=-1)
        loops = {
            "max_epochs": 3,
            "callbacks": [callback, saving],
            "enable_checkpointing": True,
            **(every if accumulate > 1 else {}),
        }
        trainer = pipeline_trainer(2, options, **loops)
        try:
            trainer.fit(module, _Validating(steps=4 * accumulate - 2 if accumulate > 1 else 2), ckpt_path=path)
        except SIGTERMException:
            path = callback.path
        ran.append(module.validated)
    return weights(module), ran


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the second run saves where the first one did
@pytest.mark.parametrize(
    ("options", "accumulate", "steps"),
    [
        ({"data_parallel_size": 2}, 1, (2, 4, 6)),
        ({"async_save": True}, 2, (1, 3, 4, 6, 7, 9)),  # every other one is in the middle of an accumulation
    ],
)
def test_all_ranks_stop_within_a_validation_and_repeat_it(
    options: dict[str, Any], accumulate: int, steps: tuple[int, ...], tmp_path: Path
) -> None:
    expected = on_ranks(2, _in_validation, None, options, accumulate, tmp_path / "undisturbed")
    stopped = on_ranks(2, _in_validation, 1, options, accumulate, tmp_path / "stopped")
    for (wanted, (whole,)), (found, (first, second)) in zip(expected, stopped, strict=True):
        assert whole == [(step, batch) for step in steps for batch in range(6)]
        begin = whole.index((4, 0))
        assert first == whole[: begin + 3], "batch 1's wish travels with batch 2, and is obeyed before batch 3"
        assert second == whole[begin:]
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


class _Forks(pl.Callback):
    """Forks a process from a training, as a DataLoader does."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        worker = mp.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        os.kill(worker.pid, signal.SIGINT)
        worker.join(0.5)
        assert worker.is_alive(), "ctrl-C reaches workers too, and must not end them before the ranks stop"
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == -signal.SIGTERM


def _forks(rank: int) -> int:
    trainer = pipeline_trainer(2, max_epochs=1, callbacks=[_Forks()])
    trainer.fit(ToyModule(), ToyData(steps=3))
    return trainer.global_step


def test_workers_end_by_sigterm_and_not_by_ctrl_c() -> None:
    assert on_ranks(2, _forks) == [3, 3]


class _LooksAfterSaves(pl.Callback):
    """How often the watchdog has looked right after each save."""

    def __init__(self, path: Path) -> None:
        self.path, self.looks = path, list[int]()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        watchdog = trainer.strategy._watching._watchdog
        before = watchdog._looks
        trainer.save_checkpoint(self.path)
        time.sleep(0.2)
        self.looks.append(watchdog._looks - before)


def _saves(rank: int, path: Path) -> list[int]:
    callback = _LooksAfterSaves(path)
    pipeline_trainer(2, max_epochs=1, callbacks=[callback]).fit(ToyModule(), ToyData(steps=5))
    return callback.looks


def test_patience_ends_with_a_save(tmp_path: Path) -> None:
    """A look within a save lets Python's lock be held as long as groups wait, which must not be so after the save."""
    for looks in on_ranks(2, _saves, tmp_path / "run.ckpt"):
        assert all(looks), "the next look comes a second later"


def _ends_first(rank: int) -> None:
    """Rank 1's process ends when its run is over, and rank 0 is still busy."""
    watchdog = Watchdog(Board("run"), rank, 2, Progress(), patience=2)
    if rank == 1:
        process = mp.get_context("fork").Process(target=_short_run)
        process.start()
        process.join()
        assert process.exitcode == 0
    else:
        watchdog.start()
    time.sleep(3 + TO_END_BY_ITSELF)  # rank 0 would be ended as if rank 1 had died
    if rank == 0:
        watchdog.stop()


def _short_run() -> None:
    watchdog = Watchdog(Board("run"), 1, 2, Progress(), patience=2)
    watchdog.start()
    time.sleep(1.5)
    watchdog.stop()


def test_the_end_of_a_process_whose_run_is_over_is_no_failure() -> None:
    on_ranks(2, _ends_first)


def test_what_a_process_is_doing() -> None:
    progress = Progress()
    assert progress.describe() == "the start of the run"
    progress.batch = 3
    progress.begin(Compute(Action.parse("0F2"), ()))
    progress.wait(Message("features", 1, 0, 2), 5)
    assert progress.describe() == "action 0F2, waits for features of group 1 piece 2 from rank 5 (batch 3)"
    progress.begin("the end")
    assert (progress.describe(), progress.beats) == ("the end (batch 3)", 2)
    assert progress.done is not None
    assert str(progress.done.action) == "0F2"
