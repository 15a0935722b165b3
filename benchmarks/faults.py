"""What happens when something goes wrong: each fault in each phase on each rank, under each launcher.

``python -m benchmarks.faults [WORD...] [--write FILE]`` runs the rows whose names contain all words, each with two real
processes that train a toy model and save a checkpoint every two steps, and prints a table: how long after the fault
every process had ended, with which exit code, which step was saved last, how many processes were left, and what was
said.
"""

import argparse
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.ranks import free_port

PHASES = ("setup", "data", "step", "forward", "optimizer", "between", "validation", "saving")
FAULTS = ("raise", "kill", "hang", "lock", "stop", "term", "term twice", "int")
WITHIN = ("worker", "layer", "backward", "generator")
"""Further phases, in which errors and lost processes are looked at."""
DISK = ("full", "vanished")
"""Faults of the folder of checkpoints."""
LAUNCHERS = ("trainer", "torchrun", "environment")
HANG_TIMEOUT = 4
"""Seconds of the watchdog."""
TIMEOUT = {"setup": 20, "saving": 20}
"""Seconds of process groups in the phases in which these are what ends a hang."""
PATIENCE = 60
"""Seconds after which a row has failed."""


@dataclass(frozen=True)
class Row:
    launcher: str
    phase: str
    rank: int
    fault: str

    def __str__(self) -> str:
        return f"{self.launcher} | {self.phase} | {self.rank} | {self.fault}"


def rows() -> list[Row]:
    """All phases under the Trainer's own launcher, and two of them under the others."""
    found = [Row("trainer", *rest) for rest in itertools.product(PHASES, (0, 1), FAULTS)]
    found += [Row("trainer", *rest) for rest in itertools.product(WITHIN, (0, 1), ("raise", "kill", "hang"))]
    found += [Row("trainer", *rest) for rest in itertools.product(("forward", "optimizer"), (0, 1), ("memory",))]
    found += [Row("trainer", *rest) for rest in itertools.product(("between",), (0, 1), DISK)]
    return found + [Row(*rest) for rest in itertools.product(LAUNCHERS[1:], ("setup", "step"), (0, 1), FAULTS)]


# -- the processes of a row ------------------------------------------------------------------------------------------


def train(phase: str, rank: int, fault: str, folder: str) -> None:
    """Train, and do what the row says."""
    from datetime import timedelta

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from bigmac_lightning import BigMacStrategy
    from bigmac_lightning.callbacks import PreemptionCheckpoint
    from tests.toy import ToyData, ToyModule
    from tests.training.trainers import QUIET

    def reach(place: str, step: int) -> None:
        mark = Path(folder) / "reached"
        if place == phase and step >= 3 and int(os.environ.get("LOCAL_RANK", 0)) == rank and not mark.exists():
            mark.write_text(str(time.time()))
            hurt(fault, Path(folder) / "saved")

    class Module(ToyModule):
        def configure_model(self) -> None:
            reach("setup", 3)
            super().configure_model()
            self.encoders["image"].register_forward_pre_hook(lambda *_: reach("forward", self.global_step))
            self.generators["drawing"].register_forward_pre_hook(lambda *_: reach("generator", self.global_step))
            layers: Any = self.llm.layers
            for layer in layers.values():
                layer.register_forward_hook(self.in_layer)

        def in_layer(self, layer: Any, given: Any, h_BSD: torch.Tensor) -> None:
            reach("layer", self.global_step)
            if h_BSD.requires_grad:
                h_BSD.register_hook(lambda _: reach("backward", self.global_step))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            reach("step", self.global_step)
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            reach("validation", self.global_step)
            return super().validation_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            reach("optimizer", self.global_step)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            reach("between", self.global_step)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            reach("saving", self.global_step)

    class Data(ToyData):
        def collate(self, indices: list[int]) -> Any:
            reach("data", min(indices))
            reach("worker", min(indices))
            return super().collate(indices)

        def loader(self, steps: int, first: int = 0) -> Any:
            workers, context = (1, "fork") if phase == "worker" and first == 0 else (0, None)
            numbers: Any = range(first, first + steps)
            return torch.utils.data.DataLoader(
                numbers, num_workers=workers, multiprocessing_context=context, collate_fn=self.collate
            )

    timeout = timedelta(seconds=TIMEOUT.get(phase, 120))
    strategy = BigMacStrategy(hang_timeout=timedelta(seconds=HANG_TIMEOUT), timeout=timeout)
    saved = Path(folder) / "saved"
    saving = ModelCheckpoint(saved, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        **QUIET,
        strategy=strategy,
        devices=2,
        max_epochs=1,
        logger=False,
        callbacks=[saving, PreemptionCheckpoint(saved)],
        val_check_interval=4,
    )
    trainer.fit(Module(), Data(steps=40))


def hurt(fault: str, saved: Path) -> None:
    if fault == "raise":
        raise RuntimeError("the dog ate this rank")
    if fault == "memory":
        torch.empty(2**50)
    if fault == "full":  # no file can grow any more, but the log that this process writes
        limit = os.fstat(1).st_size + 8192
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return
    if fault == "vanished":
        saved.rename(saved.with_name("away"))
        saved.write_text("a file where the folder was")
        return
    if fault == "hang":
        while True:
            time.sleep(1)
    if fault == "lock":  # a call of C that holds Python's lock
        import ctypes

        ctypes.PyDLL(None).sleep(1000)
    numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "int": signal.SIGINT}
    for _ in range(1 + (fault == "term twice")):
        os.kill(os.getpid(), numbers.get(fault, signal.SIGTERM))


# -- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a row has shown.

    Attributes:
        seconds: from the fault until no process was left; ``None``: some were left, or the fault was never reached.
        codes: exit codes of the processes that were started; ``None``: it was left.
        left: number of processes that were left.
        saved: the last step that was saved, and whether a checkpoint was saved when the run stopped.
        words: the line that says most.
        log: what all processes have printed.
    """

    seconds: float | None
    codes: tuple[int | None, ...]
    left: int
    saved: str
    words: str
    log: str

    def columns(self) -> list[str]:
        took = "never" if self.seconds is None else f"{self.seconds:.0f} s"
        codes = ", ".join("-" if code is None else str(code) for code in self.codes)
        return [took, codes, self.saved, str(self.left), self.words]


def run(row: Row) -> Result:
    """Run a row."""
    with tempfile.TemporaryDirectory() as folder:
        me = ["-m", "benchmarks.faults", "--child", row.phase, str(row.rank), row.fault, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "BIGMAC_FAULTS": folder}
        commands = [([sys.executable, *me], environment)]
        if row.launcher == "torchrun":
            port = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
            commands = [([sys.executable, *port, *me], environment)]
        if row.launcher == "environment":
            address = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
            commands = [([sys.executable, *me], {**address, "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            processes = [
                subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
                for command, env in commands
            ]
            seconds = wait_for_all(processes, Path(folder))
        left = alive(folder)
        codes = [process.poll() for process in processes]  # `None`: it is left
        for number in left:
            os.kill(number, signal.SIGKILL)
        for process in processes:
            process.wait()
        text = log.read_text(errors="replace")
        return Result(seconds, tuple(codes), len(left), saved(Path(folder)), words_of(text), text)


def wait_for_all(processes: list[subprocess.Popen[bytes]], folder: Path) -> float | None:
    """Seconds from the fault until no process was left; ``None`` if some were left, or if it was never reached."""
    end = time.monotonic() + 2 * PATIENCE
    while time.monotonic() < end:
        mark = folder / "reached"
        since = float(mark.read_text() or "inf") if mark.exists() else None
        if all(process.poll() is not None for process in processes) and not alive(str(folder)):
            return None if since is None else time.time() - since
        if since is not None and time.time() - since > PATIENCE:
            return None
        time.sleep(0.1)
    return None


def alive(folder: str) -> list[int]:
    """The processes of a row that have not ended, by their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            known = f"BIGMAC_FAULTS={folder}".encode() in (place / "environ").read_bytes().split(b"\0")
            if known and (place / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(place.name))
        except OSError:
            continue
    return found


def saved(folder: Path) -> str:
    """The last step that was saved, and whether a checkpoint was saved when the run stopped."""
    place = next((place for place in (folder / "away", folder / "saved") if place.is_dir()), folder)
    steps = [int(found[1]) for path in place.glob("*.ckpt") if (found := re.fullmatch(r"step=(\d+)\.ckpt", path.name))]
    text = str(max(steps, default="-"))
    return text + ", preempted" * (place / "preempted.ckpt").exists()


def words_of(log: str) -> str:
    """The line that says most, of those at the end."""
    lines = [
        line.strip() for line in log.splitlines() if line.strip() and not line.startswith((" ", "Thread", "Current"))
    ]
    own = [line for line in lines if line.startswith("[bigmac]") or "all ranks stop" in line]
    errors = [line for line in lines if re.match(r"(\[rank\d\]: )?\w*(Error|Interrupt)\b", line)]
    words = (own or errors or lines or [""])[0 if own else -1]
    return words.replace("|", "/")[:110]


HEAD = ("launcher", "phase", "rank", "fault", "all ended after", "exit codes", "last step saved", "left", "first words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", type=Path, help="a file for the table; rows that it has are not run again")
    parser.add_argument("--logs", type=Path, help="a folder for what the rows have printed")
    parser.add_argument("--child", nargs=4, metavar=("PHASE", "RANK", "FAULT", "FOLDER"))
    given = parser.parse_args()
    if given.child:
        phase, rank, fault, folder = given.child
        train(phase, int(rank), fault, folder)
        return
    table = ["| " + " | ".join(HEAD) + " |", "| " + " | ".join("---" for _ in HEAD) + " |"]
    print(*table, sep="\n", flush=True)
    before = given.write.read_text().splitlines() if given.write and given.write.exists() else []
    lines = {row: line for row in rows() for line in before if line.startswith(f"| {row} |")}
    for row in rows():
        if row not in lines and all(word in f"{row} |" for word in given.words):
            result = run(row)
            lines[row] = " | ".join(["| " + str(row), *result.columns()]) + " |"
            print(lines[row], flush=True)
            if given.logs:
                (given.logs / str(row).replace(" | ", "-")).write_text(result.log)
            if given.write:
                given.write.write_text("\n".join([*table, *(lines[one] for one in rows() if one in lines)]) + "\n")


if __name__ == "__main__":
    main()
