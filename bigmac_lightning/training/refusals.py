"""Refuses settings of the Trainer, hooks and optimizers that would silently do something else in a pipeline: by name,
on all ranks, before the first step."""

import inspect
import logging
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision, Precision, TransformerEnginePrecision
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from bigmac_lightning.checkpoints.optimizer_state import bare
from bigmac_lightning.contracts.module import PipelineModule

log = logging.getLogger(__name__)

NORMS = ("clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm", "grad_norm")
"""Functions of torch and Lightning that compute a norm from the parameters they are given: those of one rank."""

HOOKS = (
    "configure_gradient_clipping",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "optimizer_step",
    "training_step",
)


BY_NUMBER = (SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Adagrad, Adadelta, Rprop, ASGD)
"""The optimizers of torch that step each number of a parameter by itself."""


def check_settings(trainer: pl.Trainer, module: PipelineModule, precision: Precision, layer_sync: object) -> None:
    """Refuse settings that the pipeline cannot honour, and warn of batch norms.

    Raises:
        ValueError: there is such a setting; the message names it and what to use instead.
    """
    if not module.automatic_optimization:
        raise ValueError("strategy='bigmac' runs the backward itself: automatic_optimization must stay True")
    if layer_sync is not None:
        raise ValueError(
            "sync_batchnorm=True: ranks encode different numbers of items, so their batch statistics cannot be shared. "
            "Leave it out, and use layers without batch statistics (frozen ones, GroupNorm, LayerNorm)"
        )
    if isinstance(precision, BitsandbytesPrecision | TransformerEnginePrecision):
        raise ValueError(
            f"{type(precision).__name__} replaces layers, which has not been tried in a pipeline: use precision "
            "32-true, 16-mixed, bf16-mixed, 16-true, bf16-true or 64-true"
        )
    for name, child in module.named_modules():
        if isinstance(child, nn.SyncBatchNorm) and child.training:
            raise ValueError(
                f"{name} is a SyncBatchNorm: ranks encode different numbers of items, so it would wait for ever. Use "
                "layers without batch statistics (frozen ones, GroupNorm, LayerNorm)"
            )
        if isinstance(child, _BatchNorm) and child.training and child.track_running_stats and trainer.is_global_zero:
            log.warning(
                "%s is a batch norm in training mode: its output for an item depends on the other items that the same "
                "rank encodes, so gradients differ from those of one process. Its statistics are averaged over ranks",
                name,
            )


def check_averaging(trainer: pl.Trainer, sharded: Collection[str]) -> None:
    """Refuse Lightning's weight averaging where weights lie in shards.

    Args:
        sharded: the components that do.

    Raises:
        ValueError: there are shards and such a callback.
    """
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    found = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
    if sharded and found:
        raise ValueError(
            f"{found[0]} keeps a whole copy of the model, to which shards of {', '.join(sorted(sharded))} cannot be "
            "added: leave out the callback, or set sharding to ddp"
        )


def check_norms(trainer: pl.Trainer, module: PipelineModule) -> None:
    """Refuse hooks that compute a norm over the parameters of one rank.

    Raises:
        ValueError: a hook of the module, or of a callback that is not Lightning's, uses one of `NORMS`.
    """
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for owner in [module, *callbacks]:
        for hook in HOOKS:
            function = inspect.unwrap(getattr(type(owner), hook, None) or _nothing)
            if not (function.__module__ or "").startswith("lightning.") and hasattr(function, "__code__"):
                used = [name for name in NORMS if name in set(_names(function.__code__))]
                if used:
                    raise ValueError(
                        f"{type(owner).__name__}.{hook} uses {used[0]}, which would see the gradients of one rank's "
                        "part of the model: use the PipelineModule's gradient_norm(), or to clip its clip_gradients("
                        "optimizer, gradient_clip_val=..., gradient_clip_algorithm='norm'), which see all of them"
                    )


def check_optimizer(optimizer: Optimizer, precision: Precision) -> None:
    """Refuse optimizers that do not update each parameter by itself, or that leave out a step on one rank only.

    Raises:
        ValueError: the optimizer looks at several parameters together, and each rank has only some of them; or it looks
            for overflows itself, in the gradients of its rank.
    """
    optimizer, reason = bare(optimizer), ""
    if isinstance(optimizer, LBFGS):
        reason = "looks at all parameters together, but each rank has only a part of them"
    if hasattr(
        optimizer, "consolidate_state_dict"
    ):  # by this Lightning recognises ZeroRedundancyOptimizer and the like
        reason = "shards parameters over ranks that all have the same ones, but pipeline ranks have different ones"
    if reason:
        raise ValueError(
            f"{type(optimizer).__name__} {reason}: use an optimizer that steps each parameter by itself, such as "
            "AdamW, SGD, Adafactor or Muon"
        )
    _check_shards(optimizer)
    if getattr(precision, "scaler", None) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"{type(optimizer).__name__}(fused=True) looks for overflows of float16 itself, so each rank would leave "
            f"out other steps under precision {precision.precision}: leave out fused, or use bf16-mixed"
        )


def _check_shards(optimizer: Optimizer) -> None:
    """Refuse what an optimizer cannot do if some of its parameters lie in shards, or in slices of tensor peers."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return
    name = type(optimizer).__name__
    if type(optimizer) not in BY_NUMBER:
        raise ValueError(
            f"{name} is not known to step each number of a parameter by itself, as it must where weights lie in shards "
            f"or slices: use {', '.join(sorted(kind.__name__ for kind in BY_NUMBER))}, or leave out sharding and "
            "tensor_parallel_size"
        )
    at_once = [key for key in ("foreach", "fused") if any(group.get(key) for group in optimizer.param_groups)]
    if at_once and len({getattr(parameter, "device_mesh", None) for parameter in parameters}) > 1:
        raise ValueError(
            f"{name}({at_once[0]}=True) steps whole parameters and shards on different ranks at once, which torch "
            f"cannot: leave out {at_once[0]}"
        )


def _nothing() -> None: ...


def _names(code: CodeType) -> Iterator[str]:
    """Global names and attributes that a function and the functions inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
