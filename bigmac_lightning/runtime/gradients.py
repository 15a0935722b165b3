"""Sums gradients over the ranks that hold a parameter, and computes the norm of all of them, each counted once.

Losses are divided by the step's global counts before the backward, so gradients are summed, never averaged.
A parameter that no rank used keeps ``grad=None``, as in one process: its optimizer then leaves it alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigmac_lightning.runtime.mesh import PipelineMesh

HALF = (torch.bfloat16, torch.float16)

BUCKET_ELEMENTS = 8 * 2**20
"""Gradients are reduced in flat buckets of about this many elements."""


@dataclass
class ParameterPlaces:
    """Where each trainable parameter of this rank lives elsewhere too.

    Attributes:
        replicated: on every rank of the world (encoders, generators).
        stage: on the same pipeline rank of every replica (layers of the LLM).
        tied: on the first and the last stage's ranks of every replica (a tied embedding whose copies lie apart).
    """

    replicated: Mapping[str, nn.Parameter] = field(default_factory=dict)
    stage: Mapping[str, nn.Parameter] = field(default_factory=dict)
    tied: Mapping[str, nn.Parameter] = field(default_factory=dict)


def reduce_gradients(places: ParameterPlaces, mesh: PipelineMesh) -> None:
    """Make every gradient the sum over all ranks that hold its parameter. Collective over the world."""
    if mesh.pp_size * mesh.dp_size > 1:
        _reduce(list(places.replicated.values()), None, mesh.device)
    if mesh.dp_size > 1:
        _reduce(list(places.stage.values()), mesh.dp_group, mesh.device)
    if places.tied:
        _reduce(list(places.tied.values()), mesh.tied_group, mesh.device)


def _reduce(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None, device: torch.device) -> None:
    if not parameters:
        return
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    gradients: list[Tensor] = []
    for parameter, somewhere in zip(parameters, used.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        bucket = by_type.setdefault(gradient.dtype, [])
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS:
            yield by_type.pop(gradient.dtype)
    yield from by_type.values()


def global_norm(places: ParameterPlaces, mesh: PipelineMesh) -> Tensor:
    """2-norm of all gradients of the model, each parameter counted once; the same scalar on every rank.

    Call after `reduce_gradients`.
    """
    own = list(places.stage.values())
    if mesh.tied_group is None or dist.get_rank(mesh.tied_group) % 2 == 0:  # of the two copies the first counts
        own += list(places.tied.values())
    square = _square(own, mesh.device)
    if mesh.pp_size > 1:
        dist.all_reduce(square, group=mesh.pp_group)
    return (square + _square(list(places.replicated.values()), mesh.device)).sqrt()


def _square(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.get_total_norm(gradients).to(device=device, dtype=torch.float64).square()


def accumulate_in(dtype: torch.dtype | None, parameters: Iterable[nn.Parameter]) -> None:
    """Let the gradients of parameters in half precision be summed up in `dtype`; ``None``: in the parameter's own.

    Parameters that have a gradient go on as before.
    """
    for parameter in parameters:
        if parameter.grad is None and parameter.dtype in HALF:
            parameter.grad_dtype = dtype or parameter.dtype


def round_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give gradients that were summed up in a wider type their parameter's type, which optimizers expect."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.dtype != parameter.dtype:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
            parameter.grad = gradient.to(parameter.dtype)
