"""A long run, once undisturbed and once killed at random moments and resumed: are losses the same, does anything grow?

``python -m benchmarks.soak [--steps 2000] [--ranks 4] [--kills 20] [--seed 0] [--write FILE]`` trains a toy model with
dropout, a schedule, workers, validation, a monitor and a checkpoint every 25 steps in real processes. The second run is
hurt by SIGKILL of one rank or of all, or by SIGTERM of one, and started again with ``ckpt_path="auto"``, without hands.
"""

import argparse
import ctypes
import gc
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.faults import alive

EPOCH, SAVE, VALIDATE, LOOK = 500, 25, 250, 100
"""Numbers of steps: of an epoch, between saves, between validations, and between looks at the process."""
PATIENCE = 300
"""Seconds without a step after which a run has failed."""
PAGE = 4096
HURTS = ("kill one", "kill one", "kill all", "term one")

# -- the processes of a run ------------------------------------------------------------------------------------------


def train(steps: int, ranks: int, folder: Path, features: set[str]) -> None:
    """Train on to the end, and write down losses and what the process takes."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import Dataset

    from bigmac_lightning import BigMacStrategy
    from bigmac_lightning.callbacks import PipelineMonitor, PreemptionCheckpoint
    from bigmac_lightning.checkpoints.resuming import uncounted_in
    from datamodules.loading.sampler import EpochLoader, EpochSampler
    from tests.toy import ToyData, ToyModule

    rank = int(os.environ.get("LOCAL_RANK", 0))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))

    class Numbers(Dataset[int]):
        def __len__(self) -> int:
            return min(EPOCH, steps)

        def __getitem__(self, key: tuple[int, int]) -> int:
            return key[0] * EPOCH + key[1]

    class Data(ToyData):
        def train_dataloader(self) -> Any:
            numbers, workers = Numbers(), 1 if "workers" in features else 0
            sampler = EpochSampler(numbers, shuffle=True, seed=3, num_replicas=1, rank=0)
            options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
            options |= {"sampler": sampler, "collate_fn": self.collate, "batch_size": 1}
            return EpochLoader.of(numbers, uncounted=uncounted_in(self.trainer), **options)

    class Module(ToyModule):
        def configure_model(self) -> None:
            super().configure_model()
            llm: Any = self.llm
            for layer in llm.layers.values():
                if not isinstance(layer.mix, torch.nn.Sequential):
                    layer.mix = torch.nn.Sequential(layer.mix, torch.nn.Dropout(0.1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.losses.clear()  # the toy keeps them
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.losses = (folder / f"losses-{rank}").open("a", buffering=1)
            self.looks = (folder / f"looks-{rank}").open("a", buffering=1)

        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.losses.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")
            if trainer.global_step % LOOK == 0:
                self.looks.write(f"{trainer.global_step} {' '.join(map(str, look()))}\n")

    saving = ModelCheckpoint(folder / "saved", every_n_train_steps=SAVE, save_last="link", filename="{step}")
    callbacks: list[pl.Callback] = [Watch()]
    callbacks += [saving, PreemptionCheckpoint()] if "saving" in features else []
    callbacks += [PipelineMonitor(trace_step=5)] if "monitor" in features else []
    strategy = BigMacStrategy(async_save="async" in features) if "bigmac" in features else "auto"
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        max_steps=steps,
        default_root_dir=folder,
        logger=CSVLogger(folder) if "logger" in features else False,
        callbacks=callbacks,
        enable_checkpointing="saving" in features,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=min(VALIDATE, steps),
        limit_val_batches=2 if "validation" in features else 0,
        gradient_clip_val=1.0,
    )
    trainer.fit(Module(layers=max(4, ranks)), Data(microbatches=4), ckpt_path="auto" if "saving" in features else None)
    (folder / f"weights-{rank}").write_text(
        "\n".join(f"{name} {float(p.double().sum()).hex()}" for name, p in trainer.lightning_module.named_parameters())
    )


def look() -> tuple[int, int, int, int]:
    """Resident bytes, open files and threads of this process, and resident bytes of its workers."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    own, files, threads = resident("self"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    return own, files, threads, sum(resident(worker) for worker in workers())


def resident(process: str) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


def workers() -> list[str]:
    """The processes that load data for this one. Other ranks, which rank 0 has started, have another environment."""
    found: list[str] = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # the thread has ended
            found += Path(f"/proc/self/task/{thread}/children").read_text().split()
    own = Path("/proc/self/environ").read_bytes()
    return [worker for worker in found if Path(f"/proc/{worker}/environ").read_bytes() == own]


# -- runs --------------------------------------------------------------------------------------------------------------


def start(given: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes]:
    numbers = [str(given.steps), str(given.ranks), str(folder), given.features]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "BIGMAC_FAULTS": str(folder)}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak", "--child", *numbers],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def reached(folder: Path) -> int:
    """The last step that rank 0 has written down."""
    path = folder / "losses-0"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200))
        lines = [line for line in file.read().split(b"\n")[:-1] if line]
    return int(lines[-1].split()[0]) if lines else 0


def follow(process: subprocess.Popen[bytes], folder: Path, until: int | None) -> bool:
    """Wait until a step is reached; whether the run is over before.

    Raises:
        RuntimeError: it does not go on.
    """
    before, since = reached(folder), time.monotonic()
    while process.poll() is None:
        now = reached(folder)
        if now != before:
            before, since = now, time.monotonic()
        if until is not None and now >= until:
            return False
        if time.monotonic() - since > PATIENCE:
            for number in alive(str(folder)):
                os.kill(number, signal.SIGKILL)
            raise RuntimeError(f"no step in {PATIENCE} s after step {now}:\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.02)
    return True


def end(process: subprocess.Popen[bytes], folder: Path) -> float:
    """Seconds until no process of the run was left."""
    begun = time.monotonic()
    while process.poll() is None or alive(str(folder)):
        if time.monotonic() - begun > 60:
            for number in alive(str(folder)):
                os.kill(number, signal.SIGKILL)
            raise RuntimeError(f"processes are left:\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.1)
    return time.monotonic() - begun


def disturbed(given: argparse.Namespace, folder: Path) -> list[str]:
    """A run that is hurt again and again; a line for each time."""
    draw = random.Random(given.seed)
    lines = []
    points = sorted(draw.randrange(1, given.steps) for _ in range(given.kills))
    for point in points:
        process, how, rank = start(given, folder), draw.choice(HURTS), draw.randrange(given.ranks)
        if follow(process, folder, max(point, reached(folder) - SAVE)):
            break
        time.sleep(draw.random() * 0.5)
        at, ranks = reached(folder), range(given.ranks) if how.endswith("all") else [rank]
        for number in [int((folder / f"pid-{r}").read_text()) for r in ranks]:
            try:
                os.kill(number, signal.SIGTERM if how.startswith("term") else signal.SIGKILL)
            except ProcessLookupError:
                continue
        seconds = end(process, folder)
        lines.append(
            f"{how}{'' if how.endswith('all') else f' (rank {rank})'} at step {at}, gone after {seconds:.0f} s"
        )
        print(lines[-1], flush=True)
    process = start(given, folder)
    follow(process, folder, None)
    if process.returncode:
        raise RuntimeError((folder / "log").read_text()[-3000:])
    return lines


# -- results -----------------------------------------------------------------------------------------------------------


def differences(one: Path, other: Path, ranks: int) -> str:
    """The first step whose losses differ on some rank, or that is missing."""
    found: list[int] = []
    steps = repeated = 0
    for rank in range(ranks):
        whole: dict[int, set[str]] = {}
        parts: dict[int, list[str]] = {}
        for line in (one / f"losses-{rank}").read_text().splitlines():
            whole.setdefault(int(line.split()[0]), set()).add(line.split()[1])
        for line in (other / f"losses-{rank}").read_text().splitlines():
            step, loss = line.split()
            parts.setdefault(int(step), []).append(loss)
        found += [step for step in whole.keys() | parts.keys() if {*parts.get(step, ())} != whole.get(step)]
        found += [10**9] * ((one / f"weights-{rank}").read_text() != (other / f"weights-{rank}").read_text())
        steps, repeated = len(whole), repeated + sum(len(losses) - 1 for losses in parts.values())
    if found:
        return f"DIFFERENT from step {min(found)} on" if min(found) < 10**9 else "losses are equal, weights DIFFERENT"
    return f"equal bit for bit in {steps} steps on {ranks} ranks, {repeated // ranks} steps of which ran again"


def table(folder: Path, ranks: int, steps: int) -> list[str]:
    """What each process takes over time, and how much it grows after the first fifth of the run."""
    rows = ["| step | " + " | ".join(f"rank {r}: MiB, files, threads, workers' MiB" for r in range(ranks)) + " |"]
    rows.append("| --- " * (ranks + 1) + "|")
    looks = [
        [tuple(map(int, line.split())) for line in (folder / f"looks-{r}").read_text().splitlines()]
        for r in range(ranks)
    ]
    for i, first in enumerate(looks[0]):
        if i % max(1, len(looks[0]) // 10) == 0 or i == len(looks[0]) - 1:
            cells = [
                f"{own / 2**20:.1f}, {files}, {threads}, {workers / 2**20:.1f}"
                for _, own, files, threads, workers in (row[i] for row in looks)
            ]
            rows.append(f"| {first[0]} | " + " | ".join(cells) + " |")
    warm = [[look for look in row if look[0] > steps // 5] for row in looks]
    for what, column in (("of ranks", 1), ("of workers", 4)):
        slopes = [statistics.linear_regression([x[0] for x in row], [x[column] for x in row]).slope for row in warm]
        drifts = [100 * (row[-1][column] / row[0][column] - 1) if row[0][column] else 0.0 for row in warm]
        rows.append("")
        rows.append(
            f"Growth {what} after step {warm[0][0][0]}: "
            + ", ".join(f"{d:+.2f}% ({s:+.0f} bytes a step)" for d, s in zip(drifts, slopes, strict=True))
        )
    return rows


def left(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in (folder / "saved").iterdir())) if (folder / "saved").exists() else "-"


FEATURES = "bigmac,workers,saving,monitor,logger,validation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", default=FEATURES, help="of which a run is made; to find out what takes memory")
    parser.add_argument("--write", type=Path, help="a file for the results")
    parser.add_argument("--child", nargs=4, metavar=("STEPS", "RANKS", "FOLDER", "FEATURES"))
    given = parser.parse_args()
    if given.child:
        steps, ranks, folder, features = given.child
        train(int(steps), int(ranks), Path(folder), set(features.split(",")))
        return
    import lightning
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    text = [
        "# A long run, undisturbed and killed",
        "",
        f"`python -m benchmarks.soak --steps {given.steps} --ranks {given.ranks} --kills {given.kills} --seed "
        f"{given.seed}` on {os.cpu_count()} cores of a CPU, gloo, {versions}, with {given.features}.",
    ]
    with tempfile.TemporaryDirectory() as made:
        whole, parts = Path(made) / "undisturbed", Path(made) / "killed"
        whole.mkdir()
        parts.mkdir()
        begun = time.monotonic()
        process = start(given, whole)
        follow(process, whole, None)
        if process.returncode:
            raise RuntimeError((whole / "log").read_text()[-3000:])
        text += ["", f"## Undisturbed: {time.monotonic() - begun:.0f} s", "", *table(whole, given.ranks, given.steps)]
        text += ["", f"Left in the folder of checkpoints: {left(whole)}"]
        print("\n".join(text), flush=True)
        if given.kills:
            lines = disturbed(given, parts)
            more = ["", f"## Killed {len(lines)} times", "", *(f"- {line}" for line in lines), ""]
            more += [f"Losses are {differences(whole, parts, given.ranks)}."]
            more += ["", f"Left in the folder of checkpoints: {left(parts)}"]
            print("\n".join(more), flush=True)
            text += more
    if given.write:
        given.write.parent.mkdir(exist_ok=True)
        given.write.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
