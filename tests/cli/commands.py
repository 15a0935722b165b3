"""The command `bigmac`: in processes of its own as users start it, or in forked ones, which need no imports."""

import os
import subprocess
import sys
import warnings
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

from bigmac_lightning import cli
from tests.training.trainers import on_ranks

BIN = Path(sys.executable).parent


def run(command: list[str], folder: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """A command line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    print(done.stdout, done.stderr)
    return done


def bigmac(ranks: int, folder: Path, *arguments: str) -> str:
    """`bigmac` with these arguments on forked ranks, as torchrun starts it.

    Returns: what rank 0 wrote, its lines joined.
    """
    on_ranks(ranks, _main, folder, arguments)
    said = (folder / "0.log").read_text()
    print(said)
    return said.replace("\n", "")


def _main(rank: int, folder: Path, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    sys.argv = ["bigmac", *arguments]
    warnings.simplefilter("default")
    ended = suppress(SystemExit) if arguments[0] == "profile" else nullcontext()
    with open(f"{rank}.log", "w") as log, redirect_stdout(log), ended:
        cli.main()
