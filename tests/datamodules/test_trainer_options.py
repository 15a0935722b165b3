"""Options and callbacks of a Trainer that make new loaders, or change which batches are used."""

from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import LearningRateFinder

from tests.datamodules.examples import model, write_mixed
from tests.datamodules.test_resumed_runs import Run, Seen, Watch, _data, write_streamed
from tests.models import parts
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*requested to overfit.*", "ignore:.*does not have many workers.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    write_streamed(made)
    write_mixed(made, 20, videos=False)
    return made


def _fit(rank: int, kind: str, folder: Path, strategy: str = "auto", *callbacks: Any, **options: Any) -> Seen:
    watch = Watch()
    run = Run(kind=kind, trainer="limit")  # small batches of digits
    given: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0, "callbacks": [watch, *callbacks], **options}
    trainer = plain_trainer(**given) if strategy == "auto" else pipeline_trainer(2, **given)
    module = parts.model(schedule="constant") if kind == "digits" else model(schedule="constant")
    trainer.fit(module, _data(run, folder))
    return watch.seen


def _overfit(rank: int, kind: str, folder: Path) -> Seen:
    return _fit(rank, kind, folder, "bigmac", overfit_batches=2)


@pytest.mark.parametrize("kind", ["source", "mix", "digits"])
def test_overfitting_repeats_the_same_batches(kind: str, folder: Path) -> None:
    seen = _fit(0, kind, folder, overfit_batches=2)
    shown = [batch for _, _, batch in seen.batches]
    assert shown == shown[:2] * 3
    assert shown[0] != shown[1]
    assert seen.losses[-2:] < seen.losses[:2]
    if kind != "digits":
        for rank in on_ranks(2, _overfit, kind, folder):
            assert rank.batches == seen.batches
            assert rank.losses == pytest.approx(seen.losses, rel=1e-5)


def test_a_stream_continues_in_new_loaders(folder: Path) -> None:
    """... which a Trainer asks for every few epochs, or when the same training goes on; a new one begins anew."""
    whole = _fit(0, "mix", folder)
    assert len({batch for _, _, batch in whole.batches}) == len(whole.batches) == 15
    assert _fit(0, "mix", folder, reload_dataloaders_every_n_epochs=1).batches == whole.batches
    watch, data = Watch(), _data(Run(kind="mix"), folder)
    trainer = plain_trainer(max_epochs=1, limit_val_batches=0, callbacks=[watch])
    trainer.fit(model(schedule="constant"), data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, data)
    assert [batch for _, _, batch in watch.seen.batches] == [batch for _, _, batch in whole.batches]
    again = Watch()
    plain_trainer(max_epochs=1, limit_val_batches=0, callbacks=[again]).fit(model(schedule="constant"), data)
    assert again.seen.batches == whole.batches[:5]


@pytest.mark.parametrize("kind", ["source", "mix"])
def test_a_search_for_a_learning_rate_uses_no_data_up(kind: str, folder: Path) -> None:
    whole = _fit(0, kind, folder)
    finder = LearningRateFinder(1e-4, 1e-2, num_training_steps=4, update_attr=False)
    found = _fit(0, kind, folder, "auto", finder)
    trained = found.batches[-len(whole.batches) :]
    assert trained == whole.batches
    assert found.losses[-len(whole.losses) :] == whole.losses


@pytest.mark.parametrize("kind", ["source", "mix"])
def test_workers_end_with_the_run(kind: str, folder: Path) -> None:
    before = set(active_children())
    watch = Watch()
    trainer = plain_trainer(max_epochs=1, limit_val_batches=1, callbacks=[watch])
    data = _data(Run(kind=kind, workers=1), folder)
    trainer.fit(model(schedule="constant"), data)
    assert watch.seen.batches
    assert set(active_children()) <= before
    assert trainer.fit_loop._combined_loader is not None, "the loader is there still"
