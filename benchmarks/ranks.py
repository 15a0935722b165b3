"""Starts a benchmark's processes: one rank each, results back in the parent. Linux only."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import start_processes

from benchmarks.places import CPU, Place


@contextmanager
def awake_cores() -> Iterator[None]:
    """Keep every core awake at idle priority: a sleeping virtual core takes half a millisecond to wake up."""
    processes = [mp.get_context("fork").Process(target=_spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def prompt_wake_ups() -> bool:
    """Let this process and its later threads run as soon as they wake up, as a device does; needs the right to."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    return True


def _spin() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while True:
        pass


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, place: Place = CPU, prompt: bool = False
) -> list[Any]:
    """Call ``function(rank, *args)`` in `world_size` processes with a process group; returns the results by rank.

    Args:
        prompt: whether the processes and gloo's threads run as soon as they wake up, see `prompt_wake_ups`.
    """
    with TemporaryDirectory() as folder:
        given = (world_size, folder, place, prompt, function, args)
        start_processes(_rank, given, world_size, start_method=place.start_method)
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    place: Place,
    prompt: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if prompt:
        prompt_wake_ups()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    place.open(rank, world_size, f"file://{folder}/store", timedelta(minutes=5))
    torch.save(function(rank, *args), Path(folder) / f"{rank}.result")
    dist.barrier()
    dist.destroy_process_group()
