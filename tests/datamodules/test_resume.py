"""A run that was stopped in the middle of an epoch continues with exactly the samples that would have come next."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from bigmac_lightning.datamodules import PackingOptions
from bigmac_lightning.datamodules.loading.source_loader import StepLoader
from tests.datamodules.examples import data, model, train_loader, write_mixed
from tests.datamodules.test_multimodal_training import Losses
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer


def loader(path: Path, replicas: int = 1, rank: int = 0, **changes: Any) -> StepLoader:
    return train_loader(data(path, **{"token_budget": 100, "microbatches": 2, **changes}), replicas, rank)


def names(batch: Any) -> list[list[str]]:
    return [[origin.name for origin in microbatch.origins] for microbatch in batch.microbatches]


def pixels(batch: Any) -> float:
    return sum(float(item.data.double().sum()) for m in batch.microbatches for item in m.media)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("mixed"), 20, videos=False)


@pytest.mark.parametrize(("workers", "replicas"), [(0, 1), (2, 2)])
def test_a_loader_continues_where_another_stopped(path: Path, workers: int, replicas: int) -> None:
    for rank in range(replicas):
        first = loader(path, replicas, rank, num_workers=workers)
        first.sampler.set_epoch(1)
        batches = iter(first)
        stop = len(first) // 2
        for _ in range(stop):
            next(batches)
        state = first.state_dict()
        expected = [(names(batch), pixels(batch)) for batch in batches]
        assert len(expected) == len(first) - stop > 0
        second = loader(path, replicas, rank, num_workers=2 - workers)
        second.load_state_dict(state)
        second.sampler.set_epoch(1)
        assert [(names(batch), pixels(batch)) for batch in second] == expected
        second.sampler.set_epoch(2)
        assert len(list(second)) == len(second), "the next epoch is whole"


def test_an_epoch_has_every_sample_once_over_all_replicas(path: Path) -> None:
    orders = []
    for epoch in (0, 1):
        seen: list[str] = []
        for rank in range(2):
            made = loader(path, 2, rank)
            made.sampler.set_epoch(epoch)
            seen += [name for batch in made for names_ in names(batch) for name in names_]
        assert len(seen) == len(set(seen)) == 20
        orders.append(seen)
    assert orders[0] != orders[1]


def test_what_cannot_be_resumed(path: Path) -> None:
    made = loader(path)
    next(iter(made))
    state = made.state_dict()
    with pytest.raises(ValueError, match=r"data_parallel_size=1; with 2 .* end of an epoch"):
        loader(path, 2).load_state_dict(state)
    options: list[dict[str, Any]] = [{"seed": 1}, {"token_budget": 101}, {"microbatches": 3}]
    options += [{"packing": PackingOptions(**given)} for given in ({"buffer_size": 4}, {"ordered": True})]
    for changes in options:
        with pytest.raises(ValueError, match="over other data"):
            loader(path, **changes).load_state_dict(state)
    loader(path, packing=PackingOptions(packed=False)).load_state_dict(state)  # which samples a step has stays the same
    state["step"] = state["steps"]  # at an epoch's end, all of this may change
    loader(path, 2, seed=1).load_state_dict(state)


class Stop(pl.Callback):
    """Saves after a step, and ends there as if the run were killed."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / "middle.ckpt")
            raise KeyboardInterrupt


ARGUMENTS = {"token_budget": 100, "microbatches": 2, "num_workers": 2}


def _run(rank: int, world: int, dp: int, path: Path, stop: int | None, ckpt: Path | None) -> list[float]:
    strategy = {"data_parallel_size": dp}
    losses = Losses()
    callbacks: list[pl.Callback] = [losses]
    if stop is not None:
        assert ckpt is not None
        callbacks.append(Stop(ckpt.parent, stop))
    trainer = pipeline_trainer(world, strategy, max_epochs=2, callbacks=callbacks, limit_val_batches=0)
    try:
        trainer.fit(model(), data(path, **ARGUMENTS), ckpt_path=None if stop is not None else ckpt)
    except SystemExit:
        assert stop is not None
    return losses.losses


@pytest.mark.parametrize(("world", "dp", "then"), [(2, 1, 3), (2, 2, 2)], ids=["P2-to-P3", "dp2"])
def test_the_loss_curve_continues(world: int, dp: int, then: int, path: Path, tmp_path: Path) -> None:
    """Bit for bit with as many ranks; with others, the same samples, so the same losses."""
    ckpt = tmp_path / "middle.ckpt"
    whole = on_ranks(world, _run, world, dp, path, None, None)[0]
    steps = len(whole) // 2
    stop = steps + 1 if steps < 3 else steps + 2
    assert steps < stop < 2 * steps
    before = on_ranks(world, _run, world, dp, path, stop, ckpt)[0]
    after = on_ranks(then, _run, then, dp, path, None, ckpt)[0]
    assert before[: stop - 1] == whole[: stop - 1]
    if then == world:
        assert after == whole[stop:]
    else:
        assert after == pytest.approx(whole[stop:], rel=1e-5)
    assert len(after) == len(whole) - stop > 0


def test_lightning_gives_the_state_back_in_one_process(path: Path, tmp_path: Path) -> None:
    """Under strategy="auto", through Lightning's own checkpoint and its stateful loaders."""
    whole = Losses()
    made = data(path, **ARGUMENTS)
    plain_trainer(max_epochs=1, limit_val_batches=0, callbacks=[whole]).fit(model(), made)
    half = Losses()
    trainer = plain_trainer(max_epochs=1, limit_val_batches=0, callbacks=[half, Stop(tmp_path, 2)])
    with pytest.raises(SystemExit):
        trainer.fit(model(), data(path, **ARGUMENTS))
    state = torch.load(tmp_path / "middle.ckpt", weights_only=True)["loops"]["fit_loop"]["state_dict"]
    assert state["combined_loader"][0]["step"] == 2
    rest = Losses()
    trainer = plain_trainer(max_epochs=1, limit_val_batches=0, callbacks=[rest])
    trainer.fit(model(), data(path, **ARGUMENTS), ckpt_path=tmp_path / "middle.ckpt")
    assert half.losses[:1] + whole.losses[1:2] + rest.losses == whole.losses
