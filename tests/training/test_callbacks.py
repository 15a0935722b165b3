"""Every callback of Lightning under strategy="bigmac" on two ranks: as in one process, or refused by name."""

import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.loggers import CSVLogger

from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

EPOCHS, STEPS = 4, 3


class _Module(ToyModule):
    """With what callbacks ask for."""

    def __init__(self) -> None:
        super().__init__(tied=True)
        self.flops_per_batch = 100

    @property
    def backbone(self) -> torch.nn.Module:
        return self.encoders["image"]


class _Unfreezes(of_lightning.BaseFinetuning):
    """The LLM, of which each rank has another part."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.encoders["audio"])

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.encoders["audio"], optimizer, lr=3e-3)


class _Writer(of_lightning.BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("epoch")
        self.written: list[int] = []

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.written = [len(samples) for samples in predictions]


class _Bar(of_lightning.ProgressBar):
    def disable(self) -> None: ...

    enable = disable


class _Average(of_lightning.WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


Table = dict[str, Callable[[Path], pl.Callback]]

WORKING: Table = {
    "BackboneFinetuning": lambda _: of_lightning.BackboneFinetuning(unfreeze_backbone_at_epoch=1),
    "BaseFinetuning": lambda _: _Unfreezes(),
    "BasePredictionWriter": lambda _: _Writer(),
    "Callback": lambda _: of_lightning.Callback(),
    "Checkpoint": lambda _: of_lightning.Checkpoint(),
    "DeviceStatsMonitor": lambda _: of_lightning.DeviceStatsMonitor(cpu_stats=True),
    "EarlyStopping": lambda _: of_lightning.EarlyStopping("val/loss", min_delta=1e9, patience=2),
    "EMAWeightAveraging": lambda _: of_lightning.EMAWeightAveraging(decay=0.8),
    "GradientAccumulationScheduler": lambda _: of_lightning.GradientAccumulationScheduler({0: 2, 2: 3}),
    "LambdaCallback": lambda _: of_lightning.LambdaCallback(on_train_epoch_end=lambda trainer, module: None),
    "LearningRateFinder": lambda _: of_lightning.LearningRateFinder(1e-4, 1e-1, num_training_steps=14),
    "LearningRateMonitor": lambda _: of_lightning.LearningRateMonitor("step"),
    "ModelCheckpoint": lambda folder: of_lightning.ModelCheckpoint(folder, monitor="val/loss", save_top_k=2),
    "ModelSummary": lambda _: of_lightning.ModelSummary(2),
    "OnExceptionCheckpoint": lambda folder: of_lightning.OnExceptionCheckpoint(folder),
    "ProgressBar": lambda _: _Bar(),
    "RichModelSummary": lambda _: of_lightning.RichModelSummary(2),
    "RichProgressBar": lambda _: of_lightning.RichProgressBar(),
    "SpikeDetection": lambda folder: of_lightning.SpikeDetection(exclude_batches_path=folder, rtol=5.0),
    "ThroughputMonitor": lambda _: of_lightning.ThroughputMonitor(lambda batch: batch.samples),
    "Timer": lambda _: of_lightning.Timer(timedelta(hours=1)),
    "TQDMProgressBar": lambda _: of_lightning.TQDMProgressBar(),
    "WeightAveraging": lambda _: _Average(),
}
REFUSED: Table = {
    "BatchSizeFinder": lambda _: of_lightning.BatchSizeFinder(),
    "ModelPruning": lambda _: of_lightning.ModelPruning("l1_unstructured"),
    "StochasticWeightAveraging": lambda _: of_lightning.StochasticWeightAveraging(1e-2, swa_epoch_start=2),
}


def test_every_callback_has_its_row() -> None:
    assert set(of_lightning.__all__) == WORKING.keys() | REFUSED.keys()


def _train(make_trainer: Callable[..., pl.Trainer], name: str, folder: Path) -> dict[str, Any]:
    """All that can be compared."""
    callback = {**WORKING, **REFUSED}[name](folder)
    logger = CSVLogger(folder / "log")
    shown = {
        "enable_progress_bar": isinstance(callback, of_lightning.ProgressBar),
        "enable_model_summary": isinstance(callback, of_lightning.ModelSummary),
    }
    kept = {"enable_checkpointing": isinstance(callback, of_lightning.Checkpoint)}
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[callback], logger=logger, **shown, **kept)
    module = _Module()
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.filterwarnings(
            "ignore", ".*WeightAveraging.*|.*pkg_resources.*|.*lr_find.*|.*Checkpoint directory.*|.*last.*"
        )
        trainer.fit(module, ToyData(steps=STEPS))
    if isinstance(callback, of_lightning.BasePredictionWriter):
        trainer.predict(module, ToyData(), return_predictions=False)
    found: dict[str, Any] = {"steps": trainer.global_step, "epochs": trainer.current_epoch, "losses": module.losses}
    found["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    found["rates"] = [group["lr"] for group in trainer.optimizers[0].param_groups]
    if isinstance(callback, of_lightning.LearningRateFinder):
        found["lr"] = callback.optimal_lr.suggestion()
    if isinstance(callback, of_lightning.ModelCheckpoint):
        if dist.is_initialized():
            dist.barrier()  # rank 0 deletes older ones, and the others need not wait for that
        found["saved"] = sorted(path.name for path in folder.glob("*.ckpt")), Path(callback.best_model_path).name
    if isinstance(callback, _Writer):
        found["written"] = callback.written
    return {"weights": weights(module), **found}


def _train_all(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {}
    for name in WORKING:
        (folder / name).mkdir(exist_ok=True)
        found[name] = _train(lambda **options: pipeline_trainer(2, **options), name, folder / name)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(2, _train_all, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", WORKING)
def test_as_in_one_process(name: str, trained: Any, tmp_path: Path) -> None:
    expected = _train(plain_trainer, name, tmp_path)
    for rank in trained:
        found = rank[name]
        assert_close(found.pop("weights"), expected["weights"], 2e-6)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
        for key in found.keys() - {"losses", "metrics"}:
            assert found[key] == expected[key], key


def _refuse(rank: int, name: str, folder: Path) -> str:
    try:
        _train(lambda **options: pipeline_trainer(2, **options), name, folder)
    except Exception as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    for error in on_ranks(2, _refuse, name, tmp_path):
        words = "The Batch size finder is not supported" if name == "BatchSizeFinder" else f"{name} does not work"
        assert words in error


RESUMED = ["BackboneFinetuning", "BaseFinetuning", "EMAWeightAveraging", "WeightAveraging", "EarlyStopping", "Timer"]
RESUMED += ["GradientAccumulationScheduler"]


def _resume(make_trainer: Callable[..., pl.Trainer], name: str, folder: Path, resume: bool) -> Any:
    """The whole run, with a checkpoint of each epoch, or the rest of it after the second one; then a test of that."""
    saver = of_lightning.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    options = {"max_epochs": EPOCHS, "callbacks": [WORKING[name](folder), saver], "enable_checkpointing": True}
    trainer, module = make_trainer(**options), _Module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*WeightAveraging.*|.*Checkpoint directory.*")
        trainer.fit(module, ToyData(steps=STEPS), ckpt_path=folder / "epoch=1.ckpt" if resume else None)
        (tested,) = trainer.test(_Module(), ToyData(), ckpt_path=folder / "epoch=1.ckpt", verbose=False)
    return module.losses, weights(module), trainer.global_step, tested


def _resume_all(
    rank: int, world: int, names: list[str], folder: Path, distributed: bool, resume: bool
) -> dict[str, Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def make_trainer(**options: Any) -> pl.Trainer:
        return pipeline_trainer(world, {"save_distributed_checkpoint": distributed}, **options)

    return {name: _resume(make_trainer, name, folder / name, resume) for name in names}


@pytest.mark.parametrize(
    ("distributed", "names"),
    [(True, RESUMED), (False, ["BaseFinetuning", "EMAWeightAveraging"])],
    ids=["directory", "file"],
)
def test_resumed_as_if_nothing_had_been(distributed: bool, names: list[str], tmp_path: Path) -> None:
    whole = on_ranks(2, _resume_all, 2, names, tmp_path, distributed, False)
    again = on_ranks(2, _resume_all, 2, names, tmp_path, distributed, True)
    (alone,) = on_ranks(1, _resume_all, 1, names, tmp_path, distributed, True)
    for name in names:
        for before, after in zip(whole, again, strict=True):
            losses, found, steps, tested = after[name]
            assert losses, name
            assert losses == before[name][0][-len(losses) :], name
            assert_close(found, before[name][1], 0.0)
            assert (steps, tested) == before[name][2:], name
        every = {key: weight for rank in whole for key, weight in rank[name][1].items()}
        assert_close(alone[name][1], every, 1e-5)
        assert alone[name][3] == pytest.approx(whole[0][name][3], rel=1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_one_process(name: str, tmp_path: Path) -> None:
    whole = _resume(plain_trainer, name, tmp_path, False)
    again = _resume(plain_trainer, name, tmp_path, True)
    assert again[0] == whole[0][-len(again[0]) :]
    assert_close(again[1], whole[1], 0.0)
