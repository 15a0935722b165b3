"""Runs that are killed at random moments and resumed, against the same runs undisturbed.

``python -m tests.training.killed --cases 50 --seed 0`` draws cases and runs them; `test_killed.py` runs a few in CI.
Every run writes the samples, the loss and the learning rate of each batch to a file, so that nothing of it is lost when
the run is killed. It is resumed by ``ckpt_path="auto"`` until it ends by itself.
"""

import argparse
import hashlib
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from bigmac_lightning.callbacks import PreemptionCheckpoint
from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.datamodules import PackingOptions
from bigmac_lightning.models import HFDecoder, MultimodalLM
from bigmac_lightning.runtime.sharding import whole_of
from bigmac_lightning.training.options import ShardingOptions
from tests.datamodules.examples import TARGET, VOCABULARY, data, model, write_mixed
from tests.datamodules.test_streams import ONE, arguments, write_streamed
from tests.models.parts import decoder_config
from tests.toy import ToyData, ToyModule, toy_batch
from tests.training.trainers import QUIET, strategy_of

LAYERS = 6
PATIENCE = 300
"""Seconds after which an attempt hangs."""

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


class Places(DataLoader[Any]):
    """A user's own loader with a state."""

    start = given = 0

    def __iter__(self) -> Any:
        self.given, self.start = self.start, 0
        return self._rest(self.given)

    def _rest(self, first: int) -> Iterator[Any]:
        for batch in islice(super().__iter__(), first, None):
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["given"]


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


def _module(case: Case) -> MultimodalLM:
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


def _train(rank: int, case: Case, layout: Layout, folder: Path, place: Path, attempt: int, kill: Kill | None) -> None:
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
    module = Toy(LAYERS) if toys else _module(case)
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


# -- attempts ----------------------------------------------------------------------------------------------------------


def _rank(rank: int, port: int, place: Path, layout: Layout, attempt: int, work: Callable[[int], None]) -> None:
    log = os.open(place / f"log-{attempt}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (place / f"pid-{rank}").write_text(str(os.getpid()))
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": layout.world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(LOCAL_WORLD_SIZE=str(layout.world), MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    code = 1
    try:
        work(rank)
        code = 0
    except (SIGTERMException, SystemExit) as end:
        code = int(end.code or 0) if isinstance(end.code, int) else 1
        print(f"ended with {code}", flush=True)
        code = code or 77
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(case: Case, layout: Layout, folder: Path, place: Path, number: int, kill: Kill | None, took: float) -> bool:
    """Run until all ranks have ended; whether the run ended by itself, with all its epochs.

    Raises:
        AssertionError: an attempt hangs, or fails though nothing was done to it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = partial(_train, case=case, layout=layout, folder=folder, place=place, attempt=number, kill=kill)
    context = mp.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, port, place, layout, number, work)) for rank in range(layout.world)
    ]
    for process in ranks:
        process.start()
    start, hurt = time.monotonic(), kill is None or kill.when != "time"
    while any(process.is_alive() for process in ranks):
        now = time.monotonic() - start
        if not hurt and kill is not None and now > kill.share * took:
            hurt = True
            number_of = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[kill.how.split()[0]]
            for rank, process in enumerate(ranks):
                if process.is_alive() and (kill.how.endswith("all") or rank == kill.rank):
                    os.kill(process.pid or 0, number_of)
        if now > PATIENCE:
            for process in ranks:
                process.kill()
            raise AssertionError(f"attempt {number} hangs; logs:\n{logs(place, number)}")
        time.sleep(0.01)
    codes = [process.exitcode for process in ranks]
    if kill is None:
        assert codes == [0] * layout.world, f"attempt {number} has ended with {codes}:\n{logs(place, number)}"
    text = logs(place, number)
    if any(code == 1 for code in codes) and "Traceback" in text and "int" not in (kill.how if kill else ""):
        assert kill is not None
        assert "kill" in kill.how or "setup" in text, f"attempt {number}: {codes}\n{text}"
    return codes == [0] * layout.world


def logs(place: Path, number: int) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(place.glob(f"log-{number}-*")))


def newest_step(place: Path) -> int:
    """The optimizer steps of the newest whole checkpoint; 0: there is none."""
    found: list[tuple[float, int]] = [(0.0, 0)]
    for path in [p for folder in (place / "saved", place) for p in files.in_folder(folder)]:
        try:
            at = files.present(path)
        except FileNotFoundError:
            continue
        if not marker.problems(at):
            mark = marker.marker_of(at) if at.is_dir() else None
            if mark is not None:
                found.append((mark.saved, mark.step))
            elif at.is_file():
                found.append((at.stat().st_mtime, torch.load(at, weights_only=True)["global_step"]))
    return max(found)[1]


# -- comparison --------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a rank has seen, over all attempts: by the number of a batch, by optimizer steps of a validation, epochs."""

    batches: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    validations: dict[int, list[str]] = field(default_factory=dict)
    epochs: set[int] = field(default_factory=set)

    def add(self, path: Path) -> "Seen":
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            if "batch" in entry:
                self.batches.setdefault(entry.pop("batch"), []).append(entry)
            elif "epoch" in entry:
                self.epochs.add(entry["epoch"])
            else:
                self.validations.setdefault(entry["validation"], []).append(entry["loss"])
        return self


def _differs(one: str, other: str, exact: bool) -> bool:
    a, b = float.fromhex(one), float.fromhex(other)
    return a != b if exact else abs(a - b) > 1e-6 * max(abs(a), abs(b))


def compare(whole: Seen, found: Seen, exact: bool, samples: bool) -> list[str]:
    """What of a run that was killed differs from the undisturbed one."""
    problems = [f"batch {b} is missing" for b in whole.batches.keys() - found.batches.keys()]
    problems += [f"batch {b} is too much" for b in found.batches.keys() - whole.batches.keys()]
    for b in sorted(whole.batches.keys() & found.batches.keys()):
        (expected,) = whole.batches[b]
        for entry in found.batches[b]:
            same = ["place", *(["samples"] if samples else [])]
            wrong = [name for name in same if entry[name] != expected[name]]
            wrong += [name for name in ("loss", "rate") if _differs(entry[name], expected[name], exact)]
            problems += [f"batch {b}: {name} {entry[name]} instead of {expected[name]}" for name in wrong]
    problems += [f"no validation after step {s}" for s in whole.validations.keys() - found.validations.keys()]
    problems += [f"another validation after step {s}" for s in found.validations.keys() - whole.validations.keys()]
    for s in sorted(whole.validations.keys() & found.validations.keys()):
        problems += [
            f"validation after step {s}: {loss} instead of {whole.validations[s][0]}"
            for loss in found.validations[s]
            if _differs(loss, whole.validations[s][0], exact)
        ]
    return problems + [f"epoch {e} has not ended" for e in whole.epochs - found.epochs]


def weights(place: Path, world: int) -> dict[str, torch.Tensor]:
    return {name: w for rank in range(world) for name, w in torch.load(place / f"weights-{rank}").items()}


def compare_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], exact: bool) -> list[str]:
    found = []
    for name in sorted(one.keys() & other.keys()):
        if name.endswith("k_proj.bias") and not exact:
            continue  # its gradient is zero but for rounding, which AdamW makes large
        error = float((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12))
        if error > (0.0 if exact else 1e-6):
            found.append(f"weights {name}: {error:.1e}")
    return found[:5]


def check(case: Case, folder: Path, place: Path) -> list[str]:
    """Run a case.

    Returns: what has happened, attempt by attempt.

    Raises:
        AssertionError: something differs from the undisturbed run.
    """
    first = case.layouts[0]
    undisturbed, disturbed = place / "undisturbed", place / "killed"
    undisturbed.mkdir(parents=True)
    disturbed.mkdir()
    start = time.monotonic()
    assert attempt(case, first, folder, undisturbed, 0, None, 0)
    took = time.monotonic() - start
    for path in undisturbed.glob("counts-0-*"):
        shutil.copy(path, disturbed)
    story = []
    done, layout = False, first
    for number, kill in enumerate([*case.kills, None, None, None]):
        layout = case.layouts[min(number, len(case.layouts) - 1)]
        saved = newest_step(disturbed)
        if kill is not None and kill.rank >= layout.world:
            kill = replace(kill, rank=0)
        done = attempt(case, layout, folder, disturbed, number, kill, took)
        seen = Seen().add(disturbed / f"seen-{number}-0")
        begun = min(seen.batches, default=-1)
        story.append(f"{layout} {kill}: from step {saved}, batches {begun}..{max(seen.batches, default=-1)}, {done=}")
        if seen.batches:
            step = seen.batches[begun][0]["place"][2]
            assert saved <= step, f"a checkpoint of step {saved} was not used: {story}\n{logs(disturbed, number)}"
        if done:
            break
    assert done, story
    problems = []
    for rank in range(first.world if case.exact else 1):
        whole, found = Seen().add(undisturbed / f"seen-0-{rank}"), Seen()
        for path in sorted(disturbed.glob(f"seen-*-{rank}")):
            found.add(path)
        alike = case.kind != "toys" or case.exact
        problems += [f"rank {rank}: {problem}" for problem in compare(whole, found, case.exact, alike)]
    problems += compare_weights(weights(undisturbed, first.world), weights(disturbed, layout.world), case.exact)
    left = [path.name for path in (disturbed / "saved").iterdir() if path.name.endswith((".unfinished", ".removed"))]
    problems += [f"left: {left}"] if left else []
    assert not problems, "\n".join([str(case), *story, *problems[:20]])
    return story


# -- cases -------------------------------------------------------------------------------------------------------------

SHAPES = [
    Layout(1),
    Layout(2),
    Layout(2, backbone="interleaved_1f1b"),
    Layout(2, backbone="zb1p"),
    Layout(2, backbone="zbv"),
    Layout(2, backbone="gpipe"),
    Layout(2, policy="filled"),
    Layout(2, policy="upfront"),
    Layout(2, policy="recompute"),
    Layout(2, policy="first_stage"),
    Layout(2, group_size=1),
    Layout(2, encoders="zero1"),
    Layout(2, encoders="fsdp"),
    Layout(3),
    Layout(1, dp=2),
    Layout(2, dp=2),
    Layout(3, policy="disaggregated"),
]


def draw(seed: int) -> Case:
    """A case of a seed."""
    r = random.Random(seed)
    kind = r.choice(["source", "source", "source", "stream", "stream", "mix", "mix", "toys"])
    layouts = [replace(r.choice(SHAPES), workers=r.choice([0, 0, 1, 2]))]
    kills = tuple(
        Kill(r.choice(HOW), r.choice(WHEN), r.random() * r.choice([0.5, 1.0]), r.randrange(layouts[0].world))
        for _ in range(r.choice([1, 1, 2, 3]))
    )
    same = r.random() < 0.6
    for _ in kills:
        other = layouts[0] if same else r.choice([s for s in SHAPES if kind == "toys" or s.dp == layouts[0].dp])
        layouts.append(replace(other, workers=r.choice([0, 0, 1, 2])))
    if kind == "toys":
        layouts = [replace(layout, workers=0) for layout in layouts]
    directory = r.random() < 0.7
    schedule = r.choice(["cosine", "constant", "plateau"])
    return Case(
        kind=kind,
        layouts=tuple(layouts),
        kills=kills,
        accumulate=r.choice([1, 1, 2, 3]),
        tokens=r.random() < 0.3 or (kind == "toys" and not same),
        packed=r.random() < 0.8,
        ordered=r.random() < 0.2,
        videos=r.random() < 0.2,
        dropout=0.2 if same and kind != "toys" and r.random() < 0.5 else 0.0,
        schedule=schedule,
        clip=r.choice([None, 0.5]),
        validate=r.choice([0, 0, 1, 2, 3] + [-1] * (schedule != "plateau")),
        save=r.choice([0, 1, 1, 2, 3]),
        keep=r.choice([1, 1, -1]),
        last=r.choice(["", "", "copy", "link"]),
        directory=directory,
        async_save=r.random() < 0.4,
        precision="32-true" if same else "64-true",
        sanity=r.choice([0, 0, 2]),
        epochs=2 if kind == "toys" else 3,
    )


def make_data(folder: Path) -> Path:
    for name in ("mixed", "videos", "streamed"):
        (folder / name).mkdir()
    write_mixed(folder / "mixed", 20, videos=False)
    write_mixed(folder / "videos", 20)
    write_streamed(folder / "streamed")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--keep", type=Path, help="a folder for the files of cases that fail")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    _module(Case())  # imports what all runs need, before they are forked
    failed = []
    with tempfile.TemporaryDirectory() as made:
        folder = make_data(Path(made))
        for seed in range(given.seed, given.seed + given.cases):
            case, start, place = draw(seed), time.monotonic(), Path(made) / f"case-{seed}"
            try:
                story = check(case, folder, place)
                print(f"{seed}: equal, {len(story)} attempts, {time.monotonic() - start:.0f} s", flush=True)
            except AssertionError as error:
                failed.append(seed)
                print(f"{seed}: DIFFERS\n{error}", flush=True)
                if given.keep:
                    shutil.copytree(place, given.keep / place.name, dirs_exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
    print(f"{given.cases - len(failed)} of {given.cases} cases are equal; different: {failed}")


if __name__ == "__main__":
    main()
