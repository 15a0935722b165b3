"""Lightning's table of a model (`ModelSummary`, `RichModelSummary`) for a model of which each rank has a part.

Rank 0 gets names and sizes of the parts of its pipeline's ranks, and makes a model without weights of them, which
Lightning's own code then counts and prints. Weights in shards and in slices count with their whole size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary as Summary
from lightning.pytorch.utilities.model_summary.model_summary import summarize
from torch import nn

from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.runtime.mesh import PipelineMesh

HOOK = "_summary"
"""The method by which Lightning's callbacks get what they print."""


class Layer(NamedTuple):
    """A module inside a model.

    Attributes:
        kind: the name of its class.
        training: whether it is in training mode.
        has_weights: whether there are parameters in it.
    """

    name: str
    kind: str
    training: bool
    has_weights: bool


class Weight(NamedTuple):
    """A place of a parameter.

    Attributes:
        name: of this place.
        known_as: the name of the parameter's first place in the same part, or of the one that it is a tied copy of.
        size: the number of its numbers, those of other ranks included.
        trained: whether it gets gradients.
    """

    name: str
    known_as: str
    size: int
    trained: bool


@dataclass(frozen=True)
class Parts:
    """What is in a rank's part of a model."""

    layers: Sequence[Layer]
    weights: Sequence[Weight]


def parts_of(module: nn.Module, tied_copies: Mapping[str, str]) -> Parts:
    """
    Args:
        tied_copies: ``{name of a copy: name of the parameter}``.
    """
    layers, weights, first = list[Layer](), list[Weight](), dict[int, str]()
    for path, child in module.named_modules():
        if path:
            has_weights = next(child.parameters(), None) is not None
            layers.append(Layer(path, type(child).__name__, child.training, has_weights))
        for own, parameter in child._parameters.items():
            if parameter is not None:
                name = f"{path}.{own}" if path else own
                known_as = first.setdefault(id(parameter), name)
                known_as = tied_copies.get(known_as, known_as)
                weights.append(Weight(name, known_as, parameter.numel(), parameter.requires_grad))
    return Parts(layers, weights)


def stand_in(everyone: Sequence[Parts]) -> pl.LightningModule:
    """A model without weights, of all layers and parameters of these parts. A layer that several parts have, which may
    be a placeholder in some of them, is that of the first part where it has weights."""
    layers: dict[str, Layer] = {}
    for layer in (layer for parts in everyone for layer in parts.layers):
        if layer.name not in layers or (layer.has_weights and not layers[layer.name].has_weights):
            layers[layer.name] = layer
    whole = pl.LightningModule()
    made: dict[str, nn.Module] = {"": whole}
    for layer in sorted(layers.values(), key=_order):
        made[layer.name] = type(layer.kind, (nn.Module,), {})()
        made[layer.name].training = layer.training
        parent, _, own = layer.name.rpartition(".")
        made[parent]._modules[own] = made[layer.name]  # whatever its name is, also one of nn.Module's methods
    weights, parameters = {w.name: w for parts in everyone for w in parts.weights}, dict[str, nn.Parameter]()
    for weight in weights.values():
        name = _origin(weight, weights)
        if name not in parameters:
            parameters[name] = nn.Parameter(torch.empty(weight.size, device="meta"), weight.trained)
        parent, _, own = weight.name.rpartition(".")
        made[parent]._parameters[own] = parameters[name]
    return whole


def _order(layer: Layer) -> tuple[int, int]:
    """Parents come before their children, and members of a list by their numbers: a rank may have every other one."""
    *around, own = layer.name.split(".")
    return len(around), int(own) if own.isdigit() else -1


def _origin(weight: Weight, weights: Mapping[str, Weight]) -> str:
    """The name under which a parameter counts."""
    while weight.known_as != weight.name and weight.known_as in weights:
        weight = weights[weight.known_as]
    return weight.known_as


class _OfWholeModel:
    """Stands in for the `_summary` of one of Lightning's callbacks.

    Args:
        whole: see `stand_in`.
    """

    def __init__(self, whole: pl.LightningModule, callback: ModelSummary) -> None:
        self._whole, self._callback = whole, callback

    def __call__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Summary:
        self._whole.trainer = trainer
        return summarize(self._whole, max_depth=self._callback._max_depth)


def show_whole_model(trainer: pl.Trainer, module: PipelineModule, mesh: PipelineMesh) -> None:
    """Let the Trainer's tables of the model show all of it, until `show_own_part`. Collective over each pipeline,
    whatever callbacks its ranks have."""
    if mesh.pp_size == 1 or mesh.dp_rank > 0:  # the rank that prints has all layers, or is in the first pipeline
        return
    own = parts_of(module, module.tied_copies) if mesh.peer == 0 else Parts((), ())
    printing = mesh.replica_ranks[0]
    everyone: list[Any] | None = [None] * len(mesh.replica_ranks) if dist.get_rank() == printing else None
    dist.gather_object(own, everyone, printing, group=mesh.host_group)
    found = _tables(trainer) if everyone is not None else []
    if everyone is not None and found:
        whole = stand_in(everyone)
        for callback in found:
            setattr(callback, HOOK, _OfWholeModel(whole, callback))


def show_own_part(trainer: pl.Trainer) -> None:
    """Undo `show_whole_model`."""
    for callback in _tables(trainer):
        if isinstance(vars(callback).get(HOOK), _OfWholeModel):
            delattr(callback, HOOK)


def _tables(trainer: pl.Trainer) -> list[ModelSummary]:
    """The callbacks that print a table by Lightning's rules."""
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    tables = [callback for callback in callbacks if isinstance(callback, ModelSummary)]
    return [table for table in tables if getattr(type(table), HOOK) is getattr(ModelSummary, HOOK)]
