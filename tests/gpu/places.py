"""Runs functions on ranks that are on GPUs, and takes their results back to the CPU."""

import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from benchmarks.places import CPU, ONE_CARD, OWN_CARDS, Place
from tests.ranks import free_port, run_ranks
from tests.training.trainers import _with_environment


def param(place: Place, name: str, *marks: pytest.MarkDecorator) -> Any:
    why = place.why_not(2)
    return pytest.param(place, id=name, marks=[*marks, pytest.mark.skipif(bool(why), reason=why)])


ON_GPUS = (param(ONE_CARD, "one-card", pytest.mark.gpu), param(OWN_CARDS, "own-cards", pytest.mark.gpu))
EVERYWHERE = (param(CPU, "cpu", pytest.mark.wide), *ON_GPUS)


def ranks(place: Place, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 600) -> list[Any]:
    """Call ``function(rank, device, *args)`` on ranks with a process group; returns the results on the CPU."""
    return _run(place, world_size, _in_group, function, args, timeout)


def trainers(
    place: Place, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 600
) -> list[Any]:
    """Call ``function(rank, *args)`` in the environment that torchrun makes, where Trainers make the process group."""
    return _run(place, world_size, _without_group, function, args, timeout)


def arguments(place: Place, world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of the strategy and of the Trainer for ranks of a place."""
    if place.kind == "cpu":
        return {}, {"accelerator": "cpu", "devices": world_size}
    shared = place.backend == "gloo"
    strategy = {"process_group_backend": place.backend, "ranks_per_device": world_size if shared else 1}
    return strategy, {"accelerator": "gpu", "devices": 1 if shared else world_size}


def _run(place: Place, world_size: int, start: Any, function: Any, args: tuple[Any, ...], timeout: float) -> list[Any]:
    if why := place.why_not(world_size):
        pytest.skip(why)
    given = (place, world_size, free_port(), function, args)
    return run_ranks(world_size, start, *given, timeout=timeout, start_method=place.start_method)


def _in_group(rank: int, place: Place, world_size: int, port: int, function: Any, args: tuple[Any, ...]) -> Any:
    dist.barrier()
    dist.destroy_process_group()
    device = place.open(rank, world_size, f"tcp://127.0.0.1:{port}", timedelta(minutes=2))
    return on_cpu(function(rank, device, *args))


def _without_group(rank: int, place: Place, world_size: int, port: int, function: Any, args: tuple[Any, ...]) -> Any:
    dist.barrier()
    dist.destroy_process_group()
    warnings.simplefilter("ignore")
    found = on_cpu(_with_environment(rank, world_size, port, function, args))
    if not dist.is_initialized():  # one process needs no group, but `run_ranks` ends with a barrier
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    return found


def on_cpu(found: Any) -> Any:
    """The same with all tensors on the CPU."""

    def moved(leaf: Any) -> Any:
        if is_dataclass(leaf) and not isinstance(leaf, type):
            return replace(leaf, **{field.name: on_cpu(getattr(leaf, field.name)) for field in fields(leaf)})
        return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(moved, found)
