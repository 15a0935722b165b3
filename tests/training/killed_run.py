"""A run that is to be killed: its options, its model and data, what it writes down, and how it is killed.

Every run writes the samples, the loss and the learning rate of each batch to a file, so that nothing of it is lost when
it is killed.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from bigmac_lightning.callbacks import PreemptionCheckpoint
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.datamodules import PackingOptions
from bigmac_lightning.models import HFDecoder, MultimodalLM
from bigmac_lightning.runtime.sharding import whole_of
from bigmac_lightning.training.options import ShardingOptions
from tests.datamodules.examples import TARGET, VOCABULARY, data, model, write_mixed
from tests.datamodules.test_streams import ONE, arguments, write_streamed
from tests.loaders import Places
from tests.models.parts import decoder_config
from tests.toy import ToyData, ToyModule, toy_batch
from tests.training.trainers import QUIET, strategy_of

LAYERS = 6


HOW = ("kill one", "kill all", "term one", "term all", "int one", "int all")
WHEN = ("time", "beat", "file", "save")


@dataclass(frozen=True)
class Layout:
    """What may change when a run is resumed."""

    pp: int = 2
    dp: int = 1
    backbone: str = "1f1b"
    policy: str = "nested"
    group_size: int | None = None
    encoders: str = "ddp"
    workers: int = 0

    @property
    def world(self) -> int:
        return self.pp * self.dp

    def computes_as(self, other: "Layout") -> bool:
        """Whether losses must be the same bit for bit."""
        return replace(self, workers=0) == replace(other, workers=0)


@dataclass(frozen=True)
class Kill:
    """
    Attributes:
        how: of `HOW`; of `rank`, or of all ranks.
        when: after a share of the run's "time"; or of what a rank does ("beat"), of what it does to files of
            checkpoints ("file"), or of its saves ("save").
        share: between 0 and 1.
    """

    how: str = "kill all"
    when: str = "beat"
    share: float = 0.5
    rank: int = 0


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        kind: of data: "source", "stream", "mix" of both, or "toys": batches whose microbatches replicas divide.
        layouts: of the first attempt and of those after it; the last one goes on.
        schedule: "cosine", "constant", or "plateau" of the validation's loss, by epoch or by validation.
        validate: every how many batches; 0: after each epoch; -1: after each second epoch.
        save: every how many optimizer steps; 0: after each validation.
    """

    kind: str = "source"
    layouts: tuple[Layout, ...] = (Layout(),)
    kills: tuple[Kill, ...] = (Kill(),)
    accumulate: int = 1
    tokens: bool = False
    packed: bool = True
    ordered: bool = False
    videos: bool = False
    dropout: float = 0.0
    schedule: str = "cosine"
    clip: float | None = None
    validate: int = 0
    save: int = 2
    keep: int = 1
    last: str = ""
    directory: bool = True
    async_save: bool = False
    precision: str = "32-true"
    sanity: int = 0
    epochs: int = 2

    @property
    def validates_alike(self) -> bool:
        """Whether all layouts log the same loss of a validation. The toy module logs the mean of its batches, which
        are smaller with more replicas."""
        return self.kind != "toys" or len({layout.dp for layout in self.layouts}) == 1

    @property
    def exact(self) -> bool:
        return all(layout.computes_as(self.layouts[0]) for layout in self.layouts)


# -- a run -----------------------------------------------------------------------------------------------------------


class OnPlateau(pl.LightningModule):
    """Its learning rate may follow a metric."""

    plateau = False

    def configure_optimizers(self) -> Any:
        found: Any = super().configure_optimizers()
        if self.plateau:
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(found["optimizer"], factor=0.7, patience=0)
            schedule.best = 0.0  # each loss is worse, so that each epoch changes the rate
            found["lr_scheduler"] = {"scheduler": schedule, "interval": "epoch", "monitor": "val/loss"}
        return found


class Model(OnPlateau, MultimodalLM):
    pass


class Toy(OnPlateau, ToyModule):
    pass


class Toys(ToyData):
    """Eight batches of an epoch, of each of which a replica has every `dp`th microbatch."""

    def collate(self, indices: list[int]) -> Batch:
        (index,) = indices
        assert self.trainer is not None
        place: Any = self.trainer.distributed_sampler_kwargs
        made = toy_batch(8 + (index > 2), self.layout, seed=index)
        return Batch(made.microbatches[place["rank"] :: place["num_replicas"]], self.layout)

    def train_dataloader(self) -> Any:
        return Places(range(8), batch_size=1, collate_fn=self.collate)


class Watch(pl.Callback):
    """Writes down what this rank sees."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = [(m.inputs["input_ids"].tolist(), [o.name for o in m.origins]) for m in batch.microbatches]
        self._write(
            batch=trainer.fit_loop.total_batch_idx,
            place=[trainer.current_epoch, batch_idx, trainer.global_step],
            samples=hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12],
            loss=float(outputs["loss"]).hex(),
            rate=float(trainer.optimizers[0].param_groups[0]["lr"]).hex(),
        )

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self._write(validation=trainer.global_step, loss=float(trainer.callback_metrics["val/loss"]).hex())

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._write(epoch=trainer.current_epoch)

    def _write(self, **line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")


def module_of(case: Case) -> MultimodalLM:
    changes = {"attention_dropout": case.dropout, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    given = model()
    return Model(
        HFDecoder(decoder_config(**changes)),
        dict(given.encoders),  # pyright: ignore[reportArgumentType]
        dict(given.generators),  # pyright: ignore[reportArgumentType]
        learning_rate=1e-2,
        schedule="cosine" if case.schedule == "cosine" else "constant",
        warmup_steps=2,
    )


def _data(case: Case, folder: Path, layout: Layout) -> Any:
    path = folder / ("videos" if case.videos else "mixed") / "mixed.jsonl"
    packing = PackingOptions(packed=case.packed, ordered=case.ordered, buffer_size=10)
    changes: dict[str, Any] = {"token_budget": 100, "microbatches": 2, "packing": packing}
    if case.kind != "source":
        changes = arguments(folder / "streamed", packing=packing)
        if case.kind == "stream":
            changes |= {"train": changes["train"][:1], "mixture": ONE}
    val = data(path).sources("val")
    return data(path, **{**changes, "val": val, "target": TARGET, "num_workers": layout.workers})


def _trainer(case: Case, layout: Layout, place: Path, watch: Watch) -> pl.Trainer:
    strategy = strategy_of(
        pipeline_parallel_size=layout.pp,
        data_parallel_size=layout.dp,
        backbone=layout.backbone,
        policy=layout.policy,
        group_size=layout.group_size,
        sharding=ShardingOptions(encoders=layout.encoders),  # pyright: ignore[reportArgumentType]
        accumulate="tokens" if case.tokens else "batches",
        save_distributed_checkpoint=case.directory,
        async_save=case.async_save,
        timeout=timedelta(minutes=1),  # for a rank that is killed before others have met it
    )
    every: dict[str, Any] = {"every_n_train_steps": case.save} if case.save else {}
    last: Any = {"": None, "copy": True, "link": "link"}[case.last]
    saving = ModelCheckpoint(
        place / "saved", filename="{epoch}-{step}", save_top_k=case.keep, save_last=last, monitor=None, **every
    )
    options: dict[str, Any] = {"val_check_interval": case.validate} if case.validate > 0 else {}
    options |= {"check_val_every_n_epoch": 2} if case.validate < 0 else {}
    return pl.Trainer(
        **{**QUIET, "num_sanity_val_steps": case.sanity},
        default_root_dir=place,
        logger=False,
        devices=layout.world,
        strategy=strategy,
        precision=case.precision,  # pyright: ignore[reportArgumentType]
        max_epochs=case.epochs,
        limit_val_batches=2,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        callbacks=[watch, saving, PreemptionCheckpoint()],
        **options,
    )


def train(rank: int, case: Case, layout: Layout, folder: Path, place: Path, attempt: int, kill: Kill | None) -> None:
    trainer = _trainer(case, layout, place, Watch(place / f"seen-{attempt}-{rank}"))
    counts = {"beat": 0, "file": 0, "save": 0}
    wanted = {}
    if kill is not None and kill.rank == rank and kill.when in counts:
        before: dict[str, int] = json.loads((place / f"counts-0-{rank}").read_text())
        wanted = {kill.when: max(1, round(kill.share * before[kill.when]))}

    def count(what: str) -> None:
        counts[what] += 1
        if counts[what] == wanted.get(what):
            assert kill is not None
            _hurt(kill, rank, layout.world, place)

    progress: Any = trainer.strategy.progress  # pyright: ignore[reportAttributeAccessIssue]
    begin: Callable[..., None] = progress.begin

    def beat(*args: Any, **kwargs: Any) -> None:
        begin(*args, **kwargs)
        count("beat")

    progress.begin = beat
    strategy: Any = trainer.strategy
    save: Callable[..., None] = strategy.save_checkpoint

    def save_and_count(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        count("save")

    strategy.save_checkpoint = save_and_count
    saved = str(place / "saved")
    sys.addaudithook(lambda _, given: count("file") if given and str(given[0]).startswith(saved) else None)
    toys = case.kind == "toys"
    module = Toy(LAYERS) if toys else module_of(case)
    module.plateau = case.schedule == "plateau"
    trainer.fit(module, Toys() if toys else _data(case, folder, layout), ckpt_path="auto")
    weights = {name: whole_of(p.detach()).clone() for name, p in module.named_parameters()}
    torch.save(weights, place / f"weights-{rank}")
    (place / f"counts-{attempt}-{rank}").write_text(json.dumps(counts))


def _hurt(kill: Kill, rank: int, world: int, place: Path) -> None:
    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[kill.how.split()[0]]
    others = [other for other in range(world) if other != rank] if kill.how.endswith("all") else []
    for process in [int((place / f"pid-{other}").read_text()) for other in others] + [os.getpid()]:
        os.kill(process, number)


def make_data(folder: Path) -> Path:
    for name in ("mixed", "videos", "streamed"):
        (folder / name).mkdir()
    write_mixed(folder / "mixed", 20, videos=False)
    write_mixed(folder / "videos", 20)
    write_streamed(folder / "streamed")
    return folder
