"""Runs a function on several real processes with a gloo process group between them."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TESTERS = 8
"""Most processes of pytest-xdist (`make test`)."""


def free_port() -> int:
    """A port on which nothing listens, and which no other process of pytest-xdist gets from this function: the ranks
    of two tests would meet there, and wait for ever."""
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if port // 2 % TESTERS == own % TESTERS:  # Linux may give odd ones alone
            return port


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240, start_method: str = "fork"
) -> list[Any]:
    """Call ``function(rank, *args)`` in `world_size` processes.

    Returns: the results by rank.

    Raises:
        AssertionError: a rank failed or hung; with the tracebacks of all ranks that failed.
    """
    with TemporaryDirectory() as folder:
        context = mp.get_context(start_method)
        processes = [
            context.Process(target=_rank, args=(rank, world_size, Path(folder), function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes):
                if time.monotonic() > deadline or any(process.exitcode for process in processes):
                    break
                time.sleep(0.01)
            for process in processes:
                process.join(5)
        finally:
            hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
            for process in processes:
                process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        codes = [process.exitcode for process in processes]
        well = not errors and not hung and not any(codes)
        assert well, f"exit codes {codes}, hung {hung}\n" + "\n".join(errors)
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        torch.save(function(rank, *args), folder / f"{rank}.result")
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(f"--- rank {rank}\n{traceback.format_exc()}")
    os._exit(code)
