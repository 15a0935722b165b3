"""Whether a run goes on by itself after a node or a process of it was lost: two torchrun agents with one process each.

``python -m benchmarks.elastic [WORD...] [--write FILE]`` runs the rows whose names contain all words. In each,
something goes wrong once while a toy model is trained that saves every two steps and starts with ``ckpt_path="auto"``.
Agents that end with an error are started again, as Kubernetes or SLURM would. The table says how long it took until
training went on, how many steps had to run again, with which exit codes agents ended, and whether losses equal an
undisturbed run's.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.faults import alive
from tests.ranks import free_port

STEPS, HURT_AT, SLOW = 12, 5, 2.0
HANG_TIMEOUT, TIMEOUT = 4, 60
"""Seconds: of the watchdog, and of process groups."""
PATIENCE = 240
"""Seconds after which a row has failed."""
GRACE = 30
"""Seconds that an agent has after SIGTERM."""

ELASTIC = ("--rdzv-conf", "join_timeout=90,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3")


@dataclass(frozen=True)
class Row:
    """What goes wrong, and what starts agents again.

    Attributes:
        rendezvous: "c10d", "static", or "shared": c10d with the store that torchrun keeps for its workers.
        nodes: torchrun's --nnodes.
        fault: what goes wrong, on the process of rank `rank`, before its fifth step.
        again: which agents are started again when one has ended with an error: "it", "all", as JobSet does, or "none".
        late: seconds until then.
    """

    rendezvous: str
    nodes: str
    fault: str
    rank: int
    again: str = "it"
    late: float = 0

    def __str__(self) -> str:
        late = f", {self.late:.0f} s late" * bool(self.late)
        return f"{self.rendezvous} {self.nodes} | {self.fault} | {self.rank} | {self.again}{late}"


def rows() -> list[Row]:
    found = [Row("c10d", "2", "nothing", 0)]
    for rank in (0, 1):
        found += [Row("c10d", "2", fault, rank) for fault in ("kill", "raise", "hang", "preempt", "term", "node")]
    found += [
        Row("shared", "2", "kill", 1),
        Row("shared", "2", "node", 1),
        Row("c10d", "2", "agent", 1),
        Row("c10d", "2", "node", 1, late=15),
        Row("c10d", "1:2", "node", 1, again="none"),
        Row("c10d", "1:2", "node", 1, late=8),
        Row("static", "2", "kill", 1),
    ]
    found += [Row("static", "2", fault, rank, again="all") for fault in ("preempt", "node") for rank in (0, 1)]
    return found


# -- the processes of a row ------------------------------------------------------------------------------------------


def train(fault: str, rank: int, folder: Path) -> None:
    """Train, and do once what the row says."""
    from datetime import timedelta

    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, IterableDataset

    from bigmac_lightning import BigMacStrategy
    from bigmac_lightning.callbacks import PreemptionCheckpoint
    from tests.toy import ToyData, ToyModule
    from tests.training.trainers import QUIET

    class Module(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            mark = folder / "reached"
            if (self.global_step, self.global_rank) == (HURT_AT, rank) and not mark.exists() and fault != "nothing":
                mark.write_text(str(time.time()))
                hurt(fault)
            time.sleep(0.05 if self.trainer.world_size > 1 else SLOW)  # alone until the other node comes back
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            record = {"time": time.time(), "world": self.trainer.world_size, "rank": self.global_rank}
            record |= {"step": self.global_step, "loss": self.losses[-1]}
            with (folder / f"{os.getpid()}.losses").open("a") as file:
                file.write(json.dumps(record) + "\n")

    class Numbers(IterableDataset[int]):
        """Indices of batches, from wherever it is told."""

        next = 0

        def __iter__(self) -> Any:
            while self.next < STEPS:
                self.next += 1
                yield self.next - 1

    class Loader(DataLoader[Any]):
        """Goes on within an epoch."""

        def __len__(self) -> int:
            return STEPS  # else Lightning itself reads a batch ahead, and forgets it

        def state_dict(self) -> dict[str, int]:
            return {"next": self.dataset.next}  # pyright: ignore[reportAttributeAccessIssue]

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.dataset.next = state["next"]  # pyright: ignore[reportAttributeAccessIssue]

    class Data(ToyData):
        def train_dataloader(self) -> Any:
            return Loader(Numbers(), batch_size=1, collate_fn=self.collate)

    strategy = BigMacStrategy(hang_timeout=timedelta(seconds=HANG_TIMEOUT), timeout=timedelta(seconds=TIMEOUT))
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        **QUIET,
        strategy=strategy,
        devices=1,
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        max_epochs=1,
        logger=False,
        callbacks=[saving, PreemptionCheckpoint(folder)],
        limit_val_batches=0,
    )
    trainer.fit(Module(), Data(), ckpt_path="auto")


def hurt(fault: str) -> None:
    agent = os.getppid()
    if fault == "raise":
        raise RuntimeError("the dog ate this rank")
    if fault == "hang":
        time.sleep(1000)
    if fault == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if fault == "preempt":
        os.kill(agent, signal.SIGTERM)
    if fault in ("agent", "node"):
        os.kill(agent, signal.SIGKILL)
    if fault in ("kill", "node"):
        os.kill(os.getpid(), signal.SIGKILL)


# -- the table -------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a row has shown.

    Attributes:
        resumed: seconds from the fault until the first step after it was done; ``None``: training did not go on.
        again: how many steps ran a second time.
        codes: exit codes of the agents, in the order in which they ended.
        left: number of processes that were left.
        last: the last step that was done, and by how many processes.
        losses: by step, all that were found, of all attempts and ranks.
        log: what all processes have printed.
    """

    resumed: float | None = None
    again: int = 0
    codes: list[tuple[int, int]] = field(default_factory=list)
    left: int = 0
    last: tuple[int, int] = (0, 0)
    losses: dict[int, set[float]] = field(default_factory=dict)
    log: str = ""
    finished: bool = False

    def columns(self, expected: dict[int, float]) -> list[str]:
        resumed = "-" if self.resumed is None else f"{self.resumed:.0f} s"
        codes = ", ".join(f"{node}: {code}" for node, code in self.codes)
        last = f"{self.last[0]} on {self.last[1]}" + ", not finished" * (not self.finished)
        return [resumed, str(self.again), codes, last, self.compared(expected), str(self.left)]

    def compared(self, expected: dict[int, float]) -> str:
        """How far losses are from those of an undisturbed run."""
        if set(self.losses) != set(expected):
            return f"steps {sorted(set(expected) - set(self.losses))} are missing"
        errors = [abs(loss / expected[step] - 1) for step, found in self.losses.items() for loss in found]
        return "equal" if not max(errors) else f"within {max(errors):.0e}"


def arguments_of(row: Row, node: int, port: int, folder: Path) -> list[str]:
    """Of torchrun, on one of the nodes."""
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7", *ELASTIC]
    where += ["--max-restarts", "3", "--local-addr", "127.0.0.1"]
    if row.rendezvous == "static":
        where = ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        where += ["--max-restarts", "0" if row.again == "all" else "3"]
    child = ["-m", "benchmarks.elastic", "--child", row.fault, str(row.rank), str(folder)]
    return ["--nnodes", row.nodes, "--nproc-per-node", "1", "--monitor-interval", "0.1", *where, *child]


OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""If it is 1, the workers make a store of their own each time that they start. Else, with torch 2.14, an agent that
replaces another one waits for an address that the others do not tell again, and all agents fail after a minute."""


class Agent(Protocol):
    """A process of torchrun."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def torchrun(arguments: list[str], folder: Path, own_store: bool) -> Agent:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "BIGMAC_FAULTS": str(folder)}
    environment |= {OWN_STORE: str(int(own_store))}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


Start = Callable[[list[str], Path, bool], Agent]


class Agents:
    """The agents of a row, and what starts them again."""

    def __init__(self, row: Row, folder: Path, start: Start) -> None:
        self._row, self._folder, self._port, self._how = row, folder, free_port(), start
        self.running = {node: self._start(node) for node in (0, 1)}
        self.codes: list[tuple[int, int]] = []
        self._due: dict[int, float] = {}
        self._starts = 0

    def _start(self, node: int) -> Agent:
        own_store = self._row.rendezvous == "c10d"
        return self._how(arguments_of(self._row, node, self._port, self._folder), self._folder, own_store)

    def look(self) -> bool:
        """Start again what is due; whether all have ended for good."""
        for node, agent in list(self.running.items()):
            code = agent.poll()
            if code is None or node not in self.running:
                continue
            del self.running[node]
            self.codes.append((node, code))
            if code == 0 or self._row.again == "none" or self._starts >= 4:
                continue
            self._starts += 1
            self._due[node] = time.monotonic() + self._row.late
            if self._row.again == "all":
                for other, its in list(self.running.items()):
                    its.terminate()
                    self.codes.append((other, its.wait(GRACE)))
                    del self.running[other]
                self._due = dict.fromkeys((0, 1), time.monotonic())
        for node, due in list(self._due.items()):
            if time.monotonic() >= due:
                del self._due[node]
                self.running[node] = self._start(node)
        return not self.running and not self._due


def run(row: Row, start: Start = torchrun) -> Result:
    """Run a row.

    Args:
        start: starts an agent, with torchrun's arguments, the row's folder, and whether workers have their own store.
    """
    result = Result()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        agents = Agents(row, folder, start)
        end = time.monotonic() + PATIENCE
        while not (ended := agents.look()) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)
        left = alive(name)
        for number in left:
            os.kill(number, signal.SIGKILL)
        for agent in agents.running.values():
            agent.wait()
        result.left, result.codes, result.log = len(left), agents.codes, (folder / "log").read_text(errors="replace")
        since = float((folder / "reached").read_text()) if (folder / "reached").exists() else None
        runs = [
            [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(folder.glob("*.losses"))
        ]
        records = [record for run in runs for record in run]
        for record in records:
            result.losses.setdefault(record["step"], set()).add(record["loss"])
        if records:
            last = max(records, key=lambda record: record["time"])
            result.last = last["step"], last["world"]
        later = [run for run in runs if since is not None and run[0]["time"] > since]
        if later:
            result.resumed = min(run[0]["time"] for run in later) - since
            steps = [run[-1]["step"] for run in runs if run not in later]
            result.again = max(0, max(steps) - min(run[0]["step"] for run in later) + 1)
        result.finished = ended and result.last[0] == STEPS
    return result


HEAD = (
    "rendezvous, nodes",
    "fault",
    "rank",
    "started again",
    "went on after",
    "steps again",
    "agents' exit codes",
    "last step",
    "losses",
    "left",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", type=Path, help="a file for the table")
    parser.add_argument("--logs", type=Path, help="a folder for what rows have printed")
    parser.add_argument("--child", nargs=3, metavar=("FAULT", "RANK", "FOLDER"))
    given = parser.parse_args()
    if given.child:
        fault, rank, folder = given.child
        train(fault, int(rank), Path(folder))
        return
    undisturbed, *others = rows()
    expected = {step: next(iter(found)) for step, found in run(undisturbed).losses.items()}
    table = ["| " + " | ".join(HEAD) + " |", "| " + " | ".join("---" for _ in HEAD) + " |"]
    print(*table, sep="\n", flush=True)
    for row in others:
        if all(word in f"{row} |" for word in given.words):
            result = run(row)
            table.append(" | ".join(["| " + str(row), *result.columns(expected)]) + " |")
            print(table[-1], flush=True)
            if given.logs:
                (given.logs / str(row).replace(" | ", "-").replace(" ", "-")).write_text(result.log)
            if given.write:
                given.write.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
