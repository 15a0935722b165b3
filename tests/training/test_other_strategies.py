"""Checkpoints of two pipeline ranks under other strategies, and the other way round."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from bigmac_lightning.checkpoints.weights import CheckpointWeights
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 3


def _train(rank: int, folder: Path, epochs: int) -> tuple[list[float], dict[str, torch.Tensor], dict[str, float]]:
    """Saves a directory and a file."""
    module = ToyModule(tied=True)
    for distributed in (True, False):
        module = ToyModule(tied=True)
        strategy = {"save_distributed_checkpoint": distributed}
        trainer = pipeline_trainer(2, strategy, max_epochs=epochs)
        trainer.fit(module, ToyData(steps=STEPS))
        trainer.save_checkpoint(folder / ("directory.ckpt" if distributed else "file.ckpt"))
    (validated,) = trainer.validate(module, ToyData(), verbose=False)
    return module.losses, weights(module), validated


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two epochs."""
    return on_ranks(2, _train, tmp_path_factory.mktemp("whole"), 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """After the first epoch: a directory, a file, and what Lightning's own tool makes of the directory."""
    folder = tmp_path_factory.mktemp("saved")
    results = on_ranks(2, _train, folder, 1)
    torch.save(_load_distributed_checkpoint(folder / "directory.ckpt"), folder / "consolidated.ckpt")
    return folder, results


KINDS = ["directory", "file", "consolidated"]


def _go_on(make_trainer: Any, path: Path) -> tuple[list[float], dict[str, torch.Tensor], dict[str, float]]:
    module = ToyModule(tied=True)
    make_trainer(max_epochs=2, limit_val_batches=0).fit(module, ToyData(steps=STEPS), ckpt_path=path)
    again = ToyModule(tied=True)
    (validated,) = make_trainer().validate(again, ToyData(), ckpt_path=path, verbose=False)
    return module.losses, weights(module), validated


@pytest.mark.parametrize("kind", KINDS)
def test_auto_goes_on(kind: str, saved: Any, whole: Any) -> None:
    losses, found, validated = _go_on(plain_trainer, saved[0] / f"{kind}.ckpt")
    every = {key: weight for rank in whole for key, weight in rank[1].items()}
    assert losses == pytest.approx(whole[0][0][STEPS:], rel=1e-5)
    assert_close(found, every, 1e-5)
    assert validated == pytest.approx(saved[1][0][2], rel=1e-5)


def _pipeline(rank: int, path: Path) -> Any:
    return _go_on(lambda **options: pipeline_trainer(2, **options), path)


def test_a_consolidated_file_is_resumed(saved: Any, whole: Any) -> None:
    for after, before in zip(on_ranks(2, _pipeline, saved[0] / "consolidated.ckpt"), whole, strict=True):
        assert after[0] == before[0][STEPS:]
        assert_close(after[1], before[1], 0.0)


def _ddp(rank: int, path: Path) -> dict[str, torch.Tensor]:
    module = ToyModule(tied=True)
    plain_trainer(devices=2, strategy="ddp").validate(module, ToyData(), ckpt_path=path, verbose=False)
    return weights(module)


def test_ddp_reads_a_directory(saved: Any) -> None:
    every = {key: weight for rank in saved[1] for key, weight in rank[1].items()}
    for found in on_ranks(2, _ddp, saved[0] / "directory.ckpt"):
        assert_close(found, every, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_trainer(kind: str, saved: Any) -> None:
    path = saved[0] / f"{kind}.ckpt"
    every = {key: weight for rank in saved[1] for key, weight in rank[1].items()}
    stored = CheckpointWeights(path).read()
    assert_close({name: stored[name] for name in every}, every, 0.0)
    if kind != "consolidated":  # which Lightning itself does not read
        module = ToyModule.load_from_checkpoint(path, tied=True)
        assert_close(weights(module), every, 0.0)
        assert weights(module).keys() == every.keys() - {"llm.head.weight"}  # one parameter there


def _resume_plain(rank: int, path: Path) -> str:
    try:
        _go_on(lambda **options: pipeline_trainer(2, **options), path)
    except ValueError as error:
        return str(error)
    return "no error"


def test_what_another_strategy_has_saved(tmp_path: Path) -> None:
    trainer, module = plain_trainer(max_epochs=1, limit_val_batches=0), ToyModule(tied=True)
    trainer.fit(module, ToyData(steps=STEPS))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    for error in on_ranks(2, _resume_plain, tmp_path / "plain.ckpt"):
        assert "another strategy has saved them" in error
        assert "start from the weights alone" in error


def _validate_wrong(rank: int, folder: Path, name: str) -> str:
    try:
        pipeline_trainer(2).validate(ToyModule(tied=True), ToyData(), ckpt_path=folder / name, verbose=False)
    except (ValueError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.ckpt", "FileNotFoundError: there is no checkpoint at"),
        ("folder", "is not a checkpoint directory: no such file"),
        ("other.pt", "is not a checkpoint: it has no state_dict"),
    ],
)
def test_what_is_no_checkpoint(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    for error in on_ranks(2, _validate_wrong, tmp_path, name):
        assert message in error
    if name == "folder":
        with pytest.raises(ValueError, match="is not a checkpoint directory"):
            plain_trainer().validate(ToyModule(tied=True), ToyData(), ckpt_path=tmp_path / name)


def test_callbacks_that_cannot_work_are_refused_by_every_strategy() -> None:
    callback = pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    with pytest.raises(ValueError, match=r"StochasticWeightAveraging does not work .* use WeightAveraging"):
        plain_trainer(callbacks=[callback], max_epochs=1).fit(ToyModule(), ToyData())
