"""A run under torchrun goes on by itself after a process or a node of it was lost.

Agents of torchrun and their workers are forked, which spares them their imports; `python -m benchmarks.elastic` starts
real ones.
"""

import json
import multiprocessing as mp
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from benchmarks import elastic
from benchmarks.elastic import STEPS, Row
from bigmac_lightning.runtime.processes import Process
from bigmac_lightning.training.parent import end_with_agent
from tests.training.trainers import on_ranks


class _Agent:
    """A forked process that runs torchrun."""

    def __init__(self, *args: Any) -> None:
        self._process: Any = mp.get_context("fork").Process(target=_run, args=args)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        return self._process.exitcode


def _run(arguments: list[str], folder: Path, own_store: bool) -> None:
    os.setsid()
    os.environ[elastic.OWN_STORE] = str(int(own_store))
    with (folder / "log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # those of pytest are others
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    given = get_args_parser().parse_args(arguments)
    config, *_ = config_from_args(given)
    config.start_method = "fork"
    fault, rank, of = given.training_script_args[-3:]
    elastic_launch(config, _work)(fault, int(rank), Path(of))


def _work(*args: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else it has its agent's handler, as it was forked from it
    elastic.train(*args)


def _undisturbed(rank: int, folder: Path) -> dict[int, float]:
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(rank), GROUP_WORLD_SIZE="2")
    elastic.train("nothing", 0, folder)
    records = [json.loads(line) for line in (folder / f"{os.getpid()}.losses").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses by step."""
    return on_ranks(2, _undisturbed, tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.mark.filterwarnings("ignore")  # of a run that saves into a folder of others
@pytest.mark.parametrize(
    ("row", "again"),
    [
        (Row("shared", "2", "kill", 1), 1),
        pytest.param(Row("c10d", "2", "node", 1), 1, marks=pytest.mark.wide),
        pytest.param(Row("c10d", "2", "preempt", 1), 0, marks=pytest.mark.wide),
        pytest.param(Row("c10d", "2", "node", 0), 1, marks=pytest.mark.wide),
        pytest.param(Row("c10d", "2", "hang", 1), 1, marks=pytest.mark.wide),
        pytest.param(Row("c10d", "2", "agent", 1), 1, marks=pytest.mark.wide),
        pytest.param(Row("static", "2", "kill", 1), 1, marks=pytest.mark.wide),
        pytest.param(Row("static", "2", "node", 1, again="all"), 1, marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_a_run_goes_on(row: Row, again: int, undisturbed: dict[int, float]) -> None:
    result = elastic.run(row, _Agent)
    assert result.finished, result.log
    assert result.resumed is not None
    assert (result.again, result.left) == (again, 0), result.log
    assert result.compared(undisturbed) == "equal"
    assert result.last == (STEPS, 2)
    assert [code for node, code in result.codes if code == 0] == [0, 0], result.codes
    lost = {"node": -signal.SIGKILL, "preempt": 1}.get(row.fault)
    if lost is not None and row.again == "it":
        assert (row.rank, lost) in result.codes


def _agent_of(worker: Any) -> None:
    child = mp.get_context("fork").Process(target=_wait, args=(worker,))
    child.start()
    child.join()


def _wait(worker: Any) -> None:
    end_with_agent()
    worker.send(Process.own())
    time.sleep(100)


def test_a_worker_ends_with_its_agent() -> None:
    receiver, sender = mp.Pipe()
    agent = mp.get_context("fork").Process(target=_agent_of, args=(sender,))
    agent.start()
    worker: Process = receiver.recv()
    assert not worker.has_ended()
    agent.kill()
    agent.join()
    deadline = time.monotonic() + 10
    while not worker.has_ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.has_ended()
