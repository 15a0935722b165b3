"""A run that is stopped anywhere and resumed gets the samples that would have come next, with the same losses, exactly.

Every schedule, kind of data and point at which to stop, under every strategy: `pytest -m wide` runs all combinations.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from bigmac_lightning.datamodules import DigitsDataModule
from tests.datamodules.examples import TARGET, data, model, write_mixed
from tests.datamodules.test_resume import names
from tests.datamodules.test_streams import ONE, arguments, write_streamed
from tests.loaders import Places
from tests.models import parts
from tests.toy import ToyData, ToyModule
from tests.training.trainers import on_ranks, pipeline_trainer, plain_trainer

STOPS = ["batch 2", "batch 5", "epoch 1", "validation 1", "validation 2", "inside 3"]
"""After a batch, an epoch or a validation; or within a batch, which has to run again."""

TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {"max_epochs": 2},
    "accumulate": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "validations": {"max_epochs": 2, "val_check_interval": 2},
    "limit": {"max_epochs": 3, "limit_train_batches": 3},
    "max-steps": {"max_steps": 8, "max_epochs": -1},
    "reload": {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1},
}


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        strategy: "auto", "ddp", "bigmac", "bigmac-file", with single files, or "bigmac-tokens", which reads the batches
            of an optimizer step ahead.
        kind: of data: "source", "stream", "mix" of both, or "digits".
        stops: of `STOPS`.
    """

    strategy: str = "auto"
    kind: str = "source"
    schedule: str = "cosine"
    workers: int = 0
    trainer: str = "plain"
    stops: tuple[str, ...] = ("batch 2", "epoch 1")

    def __str__(self) -> str:
        return "-".join([self.strategy, self.kind, self.schedule, f"workers{self.workers}", self.trainer])


FEW = [
    Run(kind="mix", trainer="accumulate", stops=("batch 2", "inside 3")),
    Run(kind="source", trainer="max-steps", stops=("epoch 1", "validation 1")),
    Run(kind="source", schedule="constant", workers=2, trainer="validations", stops=("batch 5", "validation 1")),
    Run(kind="stream", trainer="reload", stops=("batch 5", "epoch 1")),
    Run(kind="digits", trainer="limit", stops=("epoch 1", "inside 3")),
    Run("bigmac", "source", trainer="accumulate", stops=("batch 5", "validation 1")),
    Run("bigmac-file", "mix", "constant", workers=2, stops=("batch 2", "epoch 1")),
    Run("bigmac-tokens", "mix", trainer="accumulate", stops=("batch 2", "batch 5", "epoch 1")),
    Run("ddp", "mix", stops=("batch 2", "epoch 1")),
]
GRID = product(
    ["auto", "ddp", "bigmac", "bigmac-file", "bigmac-tokens"],
    ["source", "stream", "mix", "digits"],
    ["cosine", "constant"],
    [0, 2],
    list(TRAINERS),
)
ALL = [Run(*options, stops=tuple(STOPS)) for options in GRID]


@dataclass
class Seen:
    """Of each batch its epoch, number and samples; losses, learning rates, validations, and where the run ended."""

    batches: list[Any] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    validated: list[Any] = field(default_factory=list)
    end: tuple[int, int] = (0, 0)


class Watch(pl.Callback):
    def __init__(self) -> None:
        self.seen = Seen()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tokens = [microbatch.inputs["input_ids"].tolist() for microbatch in batch.microbatches]
        self.seen.batches.append((trainer.current_epoch, batch_idx, json.dumps([names(batch), tokens])))
        self.seen.losses.append(float(outputs["loss"]))
        self.seen.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.seen.validated.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


class Stop(pl.Callback):
    """Saves, and ends there as if the run were killed."""

    def __init__(self, stop: str, path: Path) -> None:
        kind, number = stop.split()
        self.kind, self.left, self.path = kind, int(number), path

    def _reached(self, kind: str, trainer: pl.Trainer) -> None:
        self.left -= kind == self.kind
        if kind == self.kind and self.left == 0:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reached("batch", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reached("epoch", trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reached("validation", trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._reached("inside", trainer)


def _data(run: Run, folder: Path) -> Any:
    if run.kind == "digits":
        # four batches of an epoch; with a limit, as many small ones as the limit allows
        batch_size = 100 if run.trainer == "limit" else 375
        return DigitsDataModule(batch_size=batch_size, microbatches=2, num_workers=run.workers)
    changes: dict[str, Any] = {"token_budget": 100, "microbatches": 2, "num_workers": run.workers}
    if run.kind != "source":
        changes = arguments(folder, num_workers=run.workers)
        if run.kind == "stream":
            changes |= {"train": changes["train"][:1], "mixture": ONE}
    source = data(folder / "mixed.jsonl")
    return data(folder / "mixed.jsonl", **{**changes, "val": source.sources("val"), "target": TARGET})


def _fit(rank: int, run: Run, folder: Path, stop: str | None, path: Path | None) -> Seen:
    watch = Watch()
    callbacks: list[pl.Callback] = [watch]
    if stop is not None:
        assert path is not None
        callbacks.append(Stop(stop, path))
    options: dict[str, Any] = {"callbacks": callbacks, "limit_val_batches": 1, **TRAINERS[run.trainer]}
    if run.strategy == "auto":
        trainer = plain_trainer(**options)
    elif run.strategy == "ddp":
        trainer = plain_trainer(devices=2, strategy="ddp_find_unused_parameters_true", **options)
    else:
        kind: dict[str, Any] = {"save_distributed_checkpoint": run.strategy != "bigmac-file"}
        if run.strategy == "bigmac-tokens":
            kind["accumulate"] = "tokens"
        trainer = pipeline_trainer(2, kind, **options)
    module = parts.model(schedule=run.schedule) if run.kind == "digits" else model(schedule=run.schedule)
    try:
        trainer.fit(module, _data(run, folder), ckpt_path=path if stop is None else None)
    except SystemExit:
        assert stop is not None
    watch.seen.end = (trainer.current_epoch, trainer.global_step)
    return watch.seen


def _on_ranks(run: Run, *args: Any) -> list[Seen]:
    return [_fit(0, run, *args)] if run.strategy == "auto" else on_ranks(2, _fit, run, *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("data")
    write_streamed(made)
    write_mixed(made, 20, videos=False)
    return made


def check(run: Run, folder: Path, tmp_path: Path) -> None:
    whole = _on_ranks(run, folder, None, None)
    assert len(whole[0].batches) >= 5
    for stop in run.stops:
        path = tmp_path / f"{stop}.ckpt"
        before = _on_ranks(run, folder, stop, path)
        if not path.exists():
            assert stop.startswith("validation"), f"{stop} was not reached"
            continue
        for first, rest, expected in zip(before, _on_ranks(run, folder, None, path), whole, strict=True):
            done = len(expected.batches) - len(rest.batches)
            assert 0 <= len(first.batches) - done < 3, f"{stop}: batches since the last step run again"
            assert rest.batches == expected.batches[done:], stop
            assert rest.losses == expected.losses[done:], stop
            assert rest.rates == expected.rates[done:], stop
            assert rest.validated == expected.validated[len(expected.validated) - len(rest.validated) :], stop
            assert rest.end == expected.end, stop


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("run", FEW, ids=str)
def test_resumed_runs(run: Run, folder: Path, tmp_path: Path) -> None:
    check(run, folder, tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("run", ALL, ids=str)
def test_all_resumed_runs(run: Run, folder: Path, tmp_path: Path) -> None:
    check(run, folder, tmp_path)


# -- loaders that are not ours -----------------------------------------------------------------------------------------


class Toys(ToyData):
    def __init__(self, loaders: str) -> None:
        super().__init__(steps=4)
        self.loaders = loaders

    def train_dataloader(self) -> Any:
        made = {
            "p": lambda: Places(range(4), batch_size=1, collate_fn=self.collate),
            "d": lambda: self.loader(4),
        }
        loaders = [made[letter]() for letter in self.loaders]
        return loaders if len(loaders) > 1 else loaders[0]


class Estimates(ToyModule):
    """Asks for the number of steps, as a schedule does, by which Lightning makes the loaders early."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 8 // self.trainer.accumulate_grad_batches
        return super().configure_optimizers()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0] if isinstance(batch, list) else batch, batch_idx)


def _fit_toys(rank: int, strategy: str, saved: str, resumed: str, path: Path, accumulate: int = 1) -> Any:
    def fit(loaders: str, stop: str | None = None, ckpt: Path | None = None) -> list[float]:
        options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0, "accumulate_grad_batches": accumulate}
        callbacks = [] if stop is None else [Stop(stop, path)]
        make: Any = plain_trainer if strategy == "auto" else partial(pipeline_trainer, 2)
        module = Estimates()
        with suppress(SystemExit):
            make(**options, callbacks=callbacks).fit(module, Toys(loaders), ckpt_path=ckpt)
        return module.losses

    whole = fit(saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(saved, "batch 3")
        try:
            return whole, fit(resumed, ckpt=path), " ".join(str(warning.message) for warning in caught)
        except ValueError as error:
            return whole, None, str(error)


@pytest.mark.parametrize("strategy", ["auto", "bigmac"])
def test_loaders_of_others(strategy: str, tmp_path: Path) -> None:
    """Those with a state go on; where one has none, that is said; where a state has no loader, nothing goes on."""

    def results(saved: str, resumed: str) -> list[Any]:
        arguments = (strategy, saved, resumed, tmp_path / f"{saved}{resumed}.ckpt")
        return [_fit_toys(0, *arguments)] if strategy == "auto" else on_ranks(2, _fit_toys, *arguments)

    for whole, rest, _ in results("p", "p"):
        assert rest == whole[3:]
    for rank, (whole, rest, said) in enumerate(results("d", "d")):
        assert rest[0] != whole[3]
        assert ("saved after 3 batches of an epoch, but the training loader cannot go on" in said) == (rank == 0)
    for saved, resumed, text in (
        ("p", "d", "each of 1 loaders stood, but 0 of"),
        ("pp", "p", "2 loaders stood, but 1"),
    ):
        for _, rest, error in results(saved, resumed):
            assert rest is None
            assert text in error


def test_loaders_of_others_go_back_to_the_last_step(tmp_path: Path) -> None:
    """In accumulation, batches since the last step run again; other strategies cannot, and say so."""
    for whole, rest, said in on_ranks(2, _fit_toys, "bigmac", "p", "p", tmp_path / "bigmac.ckpt", 2):
        assert rest == whole[2:]
        assert "go back" not in said
    said = _fit_toys(0, "auto", "p", "p", tmp_path / "auto.ckpt", 2)[2]
    assert "1 batches since the last optimizer step" in said
    assert "the state of Places cannot go back" in said
