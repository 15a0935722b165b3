"""Checkpoints: exact resume, another number of ranks, one file, wrong files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

STEPS = 4  # per epoch


def _fit(
    rank: int,
    world: int,
    folder: Path,
    epochs: int,
    ckpt: Path | None,
    strategy: dict[str, Any],
    module: dict[str, Any],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train, saving `folder/last.ckpt` at the end."""
    trainer = pipeline_trainer(world, strategy, max_epochs=epochs, default_root_dir=folder)
    toy = ToyModule(tied=True, **module)
    trainer.fit(toy, ToyData(steps=STEPS), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "last.ckpt")
    return toy.losses, weights(toy)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two epochs at P = 2 in one go."""
    folder = tmp_path_factory.mktemp("whole")
    results = on_ranks(2, _fit, 2, folder, 2, None, {}, {})
    return results[0][0], {name: w for _, part in results for name, w in part.items()}


@pytest.mark.parametrize("distributed", [True, False], ids=["directory", "file"])
def test_resume_is_exact(
    distributed: bool, tmp_path: Path, uninterrupted: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    strategy = {"save_distributed_checkpoint": distributed}
    on_ranks(2, _fit, 2, tmp_path, 1, None, strategy, {})
    assert (tmp_path / "last.ckpt").is_dir() == distributed
    for losses, found in on_ranks(2, _fit, 2, tmp_path, 2, tmp_path / "last.ckpt", strategy, {}):
        assert losses == uninterrupted[0][STEPS:]
        assert_close(found, uninterrupted[1], 0.0)


@pytest.mark.parametrize(("world", "strategy"), [(1, {}), (3, {}), (4, {}), (4, {"policy": "disaggregated"})], ids=str)
def test_reload_with_other_ranks(
    world: int,
    strategy: dict[str, Any],
    tmp_path: Path,
    uninterrupted: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    on_ranks(2, _fit, 2, tmp_path, 1, None, {}, {})
    for losses, found in on_ranks(world, _fit, world, tmp_path, 2, tmp_path / "last.ckpt", strategy, {}):
        assert losses == pytest.approx(uninterrupted[0][STEPS:], rel=1e-5)
        assert_close(found, uninterrupted[1], 1e-5)


def test_ranks_without_stages_take_part_in_a_file(
    tmp_path: Path, uninterrupted: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    strategy = {"policy": "disaggregated", "save_distributed_checkpoint": False}
    on_ranks(3, _fit, 3, tmp_path, 1, None, strategy, {})
    for losses, found in on_ranks(2, _fit, 2, tmp_path, 2, tmp_path / "last.ckpt", {}, {}):
        assert losses == pytest.approx(uninterrupted[0][STEPS:], rel=1e-5)
        assert_close(found, uninterrupted[1], 1e-5)


def test_from_one_rank_to_two(tmp_path: Path, uninterrupted: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    """A tied weight is one parameter there and two copies here."""
    on_ranks(1, _fit, 1, tmp_path, 1, None, {}, {})
    for losses, found in on_ranks(2, _fit, 2, tmp_path, 2, tmp_path / "last.ckpt", {}, {}):
        assert losses == pytest.approx(uninterrupted[0][STEPS:], rel=1e-5)
        assert_close(found, uninterrupted[1], 1e-5)


def test_a_file_loads_without_the_strategy(tmp_path: Path) -> None:
    results = on_ranks(2, _fit, 2, tmp_path, 1, None, {"save_distributed_checkpoint": False}, {})
    module = ToyModule(tied=True)
    module.configure_model()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(state)
    for _, found in results:
        assert_close(found, weights(module), 0.0)


def test_a_directory_consolidates_with_lightnings_own_tool(tmp_path: Path) -> None:
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    results = on_ranks(2, _fit, 2, tmp_path, 1, None, {}, {})
    state = _load_distributed_checkpoint(tmp_path / "last.ckpt")["model"]
    for _, found in results:
        assert_close(found, state, 0.0)


def test_weights_of_a_plain_checkpoint(tmp_path: Path) -> None:
    trainer = plain_trainer(max_epochs=1)
    module = ToyModule(tied=True)
    trainer.fit(module, ToyData(steps=STEPS))
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    for found in on_ranks(2, _validate, 2, tmp_path / "plain.ckpt"):
        assert_close(found, weights(module), 0.0)


def _validate(rank: int, world: int, ckpt: Path) -> dict[str, torch.Tensor]:
    module = ToyModule(tied=True)
    pipeline_trainer(world).validate(module, ToyData(), ckpt_path=ckpt, verbose=False)
    return weights(module)


def _fit_other(rank: int, folder: Path, module: dict[str, Any]) -> str:
    try:
        _fit(rank, 2, folder, 2, folder / "last.ckpt", {}, module)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("distributed", [True, False], ids=["directory", "file"])
def test_another_models_checkpoint(distributed: bool, tmp_path: Path) -> None:
    """Only the second rank's layers are missing, but all ranks refuse."""
    on_ranks(2, _fit, 2, tmp_path, 1, None, {"save_distributed_checkpoint": distributed}, {})
    for message in on_ranks(2, _fit_other, tmp_path, {"layers": 5}):
        assert "another model" in message
        assert "llm.layers.4.mix.weight: missing" in message
    for message in on_ranks(2, _fit_other, tmp_path, {"layers": 3}):
        assert "llm.layers.3.mix.weight: not in the model" in message


def _fit_callbacks(rank: int, folder: Path) -> tuple[int, str, list[str], float]:
    saver = ModelCheckpoint(folder, "{epoch}", monitor="val/loss", mode="max", save_top_k=2)
    stopper = EarlyStopping("val/loss", min_delta=1e9, patience=3, mode="min")
    trainer = pipeline_trainer(2, callbacks=[saver, stopper], enable_checkpointing=True, max_epochs=20)
    trainer.fit(ToyModule(lr=3e-2), ToyData(steps=STEPS))
    kept = sorted(path.name for path in folder.iterdir())
    return trainer.current_epoch, saver.best_model_path, kept, float(saver.best_model_score or 0)


def test_callbacks_that_watch_a_metric(tmp_path: Path) -> None:
    results = on_ranks(2, _fit_callbacks, tmp_path)
    assert results[0] == results[1]
    epochs, best, kept, _ = results[0]
    assert epochs == 4  # the first, and three without the asked improvement
    assert len(kept) == 2
    assert Path(best).name in kept
