"""Trainers for tests: one process without a pipeline, or real ranks that find their environment as under torchrun."""

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
import torch

from bigmac_lightning import BigMacStrategy, ScheduleOptions, StageOptions
from bigmac_lightning.runtime.sharding import whole_of
from tests.ranks import free_port, run_ranks
from tests.toy import ToyModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
}


def plain_trainer(**kwargs: Any) -> pl.Trainer:
    return pl.Trainer(**{**QUIET, "logger": False, "enable_checkpointing": False, "devices": 1, **kwargs})


def strategy_of(**arguments: Any) -> BigMacStrategy:
    """A strategy of arguments among which those of its groups stand, too."""
    schedule, stages = (
        kind(**{entry.name: arguments.pop(entry.name) for entry in fields(kind) if entry.name in arguments})
        for kind in (ScheduleOptions, StageOptions)
    )
    return BigMacStrategy(schedule=schedule, stages=stages, **arguments)


def pipeline_trainer(world_size: int, strategy: dict[str, Any] | None = None, **kwargs: Any) -> pl.Trainer:
    """To be called on a rank."""
    defaults = {**QUIET, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(**{**defaults, "devices": world_size, "strategy": strategy_of(**(strategy or {})), **kwargs})


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Like `run_ranks`, in the environment that torchrun makes."""
    return run_ranks(world_size, _with_environment, world_size, free_port(), function, args, timeout=timeout)


def _with_environment(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    return function(rank, *args)


def weights(module: ToyModule) -> dict[str, torch.Tensor]:
    """Of what this rank has; collective where weights lie in shards."""
    return {name: whole(parameter.detach()).clone() for name, parameter in module.named_parameters()}


def whole(tensor: Any) -> Any:
    """The whole tensor that may lie in shards or slices, or nothing. Collective over the ranks that have them."""
    return None if tensor is None else whole_of(tensor)


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Every parameter that a rank holds, relative to its norm; a tied copy against the embedding."""
    assert actual
    for name, value in actual.items():
        other = expected[name] if name in expected else expected["llm.embedding.weight"]
        error = float((value - other).norm() / other.norm().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: {error:.1e}"
