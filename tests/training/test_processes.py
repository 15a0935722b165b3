"""Processes, and what is left when a run is over: timeouts, forked and spawned runs, notebooks, parts of models."""

import gc
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from bigmac_lightning import BigMacStrategy
from bigmac_lightning.ranks import Ranks
from tests.toy import ToyData, ToyLLM, ToyModule
from tests.training.trainers import QUIET, assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 3


class _Timeouts(pl.Callback):
    """Of every group there is after the first step, by its name."""

    def __init__(self) -> None:
        self.found: dict[str, timedelta] = {}
        self.ranks = Ranks()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ranks.exchange(None)()
        for group in dist.distributed_c10d._world.pg_map:
            for device in group._device_types:
                self.found[group.group_name] = group._get_backend(device).options._timeout


def _timeouts(rank: int, world: int, dp: int) -> dict[str, timedelta]:
    dist.barrier()  # so that no rank is still connecting
    dist.destroy_process_group()  # the test's own; Lightning makes another
    timeouts = _Timeouts()
    strategy = {"data_parallel_size": dp, "timeout": timedelta(seconds=47)}
    trainer = pipeline_trainer(world, strategy, max_steps=1, callbacks=[timeouts], limit_val_batches=0)
    trainer.fit(ToyModule(tied=True), ToyData())
    return timeouts.found


@pytest.mark.parametrize(("world", "dp"), [(2, 1), (4, 2)])
def test_every_group_has_the_timeout_of_the_strategy(world: int, dp: int) -> None:
    for found in on_ranks(world, _timeouts, world, dp):
        assert len(found) >= 4
        assert set(found.values()) == {timedelta(seconds=47)}, found


# -- one process starts the others, and has the whole model afterwards -------------------------------------------------


def _fit_and_evaluate(trainer: pl.Trainer, module: ToyModule) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    trainer.fit(module, ToyData(steps=STEPS))
    (validated,) = trainer.validate(module, ToyData(), verbose=False)
    return weights(module), validated


@pytest.fixture(scope="module")
def reference() -> list[tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """One process, twice in a row."""
    module = ToyModule(tied=True)
    return [_fit_and_evaluate(plain_trainer(max_epochs=1), module) for _ in range(2)]


def test_forked_processes_give_the_whole_model_back(reference: Any, tmp_path: Path) -> None:
    """... and take it on, each its part, in the next run."""
    module = ToyModule(tied=True)
    for expected, validated in reference:
        options = {**QUIET, "logger": False, "enable_checkpointing": False, "max_epochs": 1, "devices": 2}
        trainer = pl.Trainer(strategy=BigMacStrategy(start_method="fork"), **options)
        found, logged = _fit_and_evaluate(trainer, module)
        assert found.keys() == expected.keys()
        assert_close(found, expected, 2e-6)
        assert logged == pytest.approx(validated, rel=1e-5)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again = ToyModule(tied=True)
    again.configure_model()
    again.load_state_dict(ToyModule.load_from_checkpoint(tmp_path / "whole.ckpt", tied=True).state_dict())
    assert_close(weights(again), expected, 2e-6)


NOTEBOOK = """
import sys
import lightning.pytorch as pl
import torch
import bigmac_lightning
from tests.training.trainers import QUIET, assert_close, plain_trainer
from tests.training.test_processes import _fit_and_evaluate
from tests.toy import ToyModule

torch.set_num_threads(1)
assert bool(sys.flags.interactive) == (sys.argv[1] == "bigmac_notebook")
options = {**QUIET, "logger": False, "enable_checkpointing": False, "max_epochs": 1}
if __name__ == "__main__":
    if sys.flags.interactive:
        try:
            pl.Trainer(strategy="bigmac", devices=2, **options)
        except ValueError as error:
            print("refused:", error)
    expected = _fit_and_evaluate(plain_trainer(max_epochs=1), ToyModule(tied=True))
    found = _fit_and_evaluate(pl.Trainer(strategy=sys.argv[1], devices=2, **options), ToyModule(tied=True))
    assert_close(found[0], expected[0], 2e-6)
    assert found[0].keys() == expected[0].keys()
    assert found[1].keys() == expected[1].keys()
    assert all(abs(found[1][name] - value) < 1e-5 for name, value in expected[1].items())
    print("the same")
"""


@pytest.mark.parametrize("strategy", ["bigmac_notebook", pytest.param("bigmac_spawn", marks=pytest.mark.wide)])
def test_an_interactive_session(strategy: str, tmp_path: Path) -> None:
    script = tmp_path / "session.py"
    script.write_text(NOTEBOOK)
    flags = ["-i"] if strategy == "bigmac_notebook" else []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *flags, str(script), strategy]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False
    )
    assert "the same" in done.stdout, done.stdout + done.stderr
    assert ("refused: strategy='bigmac' runs a script once more" in done.stdout) == bool(flags)


# -- processes that live on hold their part ----------------------------------------------------------------------------


def _refused(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return "no error"


def _after_a_run(rank: int, folder: Path) -> Any:
    module = ToyModule(tied=True)
    saver = ModelCheckpoint(folder, monitor="val/loss")
    trainer = pipeline_trainer(2, max_epochs=1, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(module, ToyData(steps=STEPS))
    (validated,) = trainer.validate(module, ToyData(), verbose=False)
    (best,) = trainer.validate(module, ToyData(), ckpt_path="best", verbose=False)
    (other,) = trainer.validate(ToyModule(tied=True), ToyData(), ckpt_path=saver.best_model_path, verbose=False)
    errors = [_refused(module.state_dict), _refused(module.pipeline, next(iter(_data(trainer).val_dataloader())))]
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "after.ckpt", weights_only=True)
    errors += [
        _refused(module.state_dict),
        _refused(pipeline_trainer(2, {"partition": [1, 3]}).validate, module, ToyData()),
    ]
    errors.append(_refused(plain_trainer().validate, module, ToyData()) if rank == 0 else "")
    return validated, best, other, errors, weights(module)


def _data(trainer: pl.Trainer) -> ToyData:
    data = ToyData()
    data.trainer = trainer
    return data


def test_what_is_left_of_a_run_is_right_or_refused(reference: Any, tmp_path: Path) -> None:
    expected, logged = reference[0]
    results = on_ranks(2, _after_a_run, tmp_path)
    for validated, best, other, errors, found in results:
        assert validated == pytest.approx(logged, rel=1e-5)
        assert best == other == validated
        assert_close(found, expected, 2e-6)
        for error in errors[:3]:
            assert "this process holds layers" in error
            assert "trainer.save_checkpoint(PATH) writes the whole model" in error
        assert "and is to hold layers" in errors[3]
    assert "this process holds layers 0 to 1 of ToyModule" in results[0][3][4]
    whole = ToyModule.load_from_checkpoint(tmp_path / "after.ckpt", tied=True)
    assert_close(weights(whole), expected, 2e-6)
    assert weights(whole).keys() == expected.keys()


class _KeepsAll(ToyLLM):
    def keep(self, layers: Any, embedding: bool, head: bool) -> None:
        super(ToyLLM, self).keep(layers, embedding, head)


def _fit_whole(rank: int, keeps_all: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]] | str:
    module = ToyModule(tied=True)
    module.configure_model()
    if keeps_all:
        module.llm.__class__ = _KeepsAll
        return _refused(_fit_and_evaluate, pipeline_trainer(2, max_epochs=1), module)
    return _fit_and_evaluate(pipeline_trainer(2, max_epochs=1), module)


def test_a_module_that_has_all_its_weights(reference: Any) -> None:
    expected, logged = reference[0]
    results: Any = on_ranks(2, _fit_whole, False)
    for found, validated in results:
        assert_close(found, expected, 2e-6)
        assert validated == pytest.approx(logged, rel=1e-5)
    assert not {name for name in results[0][0] if name.startswith("llm.")} & set(results[1][0])
    for error in on_ranks(2, _fit_whole, True):
        assert "_KeepsAll has all its weights already, and has no method `keep`" in error


def _left_behind(rank: int) -> list[tuple[int, int, int]]:
    """Numbers of process groups, threads and open files after each of three trainers."""
    found = []
    for _ in range(3):
        trainer = pipeline_trainer(2, max_epochs=1)
        trainer.fit(ToyModule(), ToyData(steps=1))
        del trainer
        gc.collect()
        files = os.listdir("/proc/self/fd")
        found.append((len(dist.distributed_c10d._world.pg_map), len(os.listdir("/proc/self/task")), len(files)))
    return found


def test_process_groups_end_with_their_strategy() -> None:
    for first, *later in on_ranks(2, _left_behind):
        assert first[0] == 1, "the test's own"
        assert later == [first, first]
