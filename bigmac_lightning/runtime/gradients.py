"""Sums gradients over the ranks that have the same parameter, and computes the norm of all gradients of the model.

Each loss is divided by the step's global counts before its backward, so gradients are summed and never averaged. A
parameter that no rank used keeps ``grad=None``, as it would in one process, so that its optimizer skips it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigmac_lightning.host import from_host
from bigmac_lightning.runtime.mesh import PipelineMesh

HALF_PRECISION = (torch.bfloat16, torch.float16)

BUCKET_ELEMENTS = 8 * 2**20
"""Number of elements from which a bucket of gradients is reduced. This makes 32 MiB in float32, near the 25 MiB of
torch's DistributedDataParallel; it was not tuned."""


@dataclass
class ParameterPlaces:
    """The trainable parameters of this rank by name, according to the other ranks that have the same parameter.

    Attributes:
        replicated: parameters that every rank of the world has (those of encoders and generators).
        stage: parameters that the same pipeline rank of every pipeline has (those of the LLM's layers).
        tied: parameters that the first and the last stage's ranks of every pipeline have (a tied embedding, if the two
            stages are on different ranks).
    """

    replicated: Mapping[str, nn.Parameter] = field(default_factory=dict)
    stage: Mapping[str, nn.Parameter] = field(default_factory=dict)
    tied: Mapping[str, nn.Parameter] = field(default_factory=dict)


def reduce_gradients(places: ParameterPlaces, mesh: PipelineMesh) -> None:
    """Replace every gradient by its sum over all ranks that have the parameter. Collective: all ranks must call it."""
    replicated, stage, tied = (list(kind.values()) for kind in (places.replicated, places.stage, places.tied))
    shared: list[tuple[list[nn.Parameter], dist.ProcessGroup | None]] = []
    if replicated and mesh.pp_size * mesh.dp_size > 1:
        shared.append((replicated, None))
    if stage and mesh.dp_size > 1:
        shared.append((stage, mesh.dp_group))
    if tied:
        shared.append((tied, mesh.tied_group))
    used = [_used_on_a_rank(parameters, group, mesh.device) for parameters, group in shared]
    if not used:
        return
    flags = iter(torch.cat(used).tolist())  # here the host waits for the device, once for all parameters
    for parameters, group in shared:
        _reduce([parameter for parameter in parameters if next(flags)], group)


def _used_on_a_rank(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None, device: torch.device
) -> Tensor:
    """Whether any rank of a group used each parameter, as int32 on the device: all ranks must reduce the same list."""
    used = from_host([parameter.grad is not None for parameter in parameters], torch.int32, device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    return used


def _reduce(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sum the gradients of these parameters over a group. A rank that did not use a parameter contributes zeros."""
    gradients: list[Tensor] = []
    for parameter in parameters:
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
    """Yield the gradients in lists of one dtype each, with at least BUCKET_ELEMENTS elements except the last ones."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        bucket = by_type.setdefault(gradient.dtype, [])
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS:
            yield by_type.pop(gradient.dtype)
    yield from by_type.values()


def global_norm(places: ParameterPlaces, mesh: PipelineMesh) -> Tensor:
    """Return the 2-norm of all gradients of the model, a float64 scalar that is equal on every rank. Collective over
    the pipeline. Each parameter counts once. `reduce_gradients` must have been called before.
    """
    own = list(places.stage.values())
    # The tied group has the first and the last stage's rank of each pipeline in turn; only the first one's copy counts.
    if mesh.tied_group is None or dist.get_rank(mesh.tied_group) % 2 == 0:
        own += list(places.tied.values())
    square = _square(own, mesh.device)
    if mesh.pp_size > 1:
        dist.all_reduce(square, group=mesh.pp_group)
    return (square + _square(list(places.replicated.values()), mesh.device)).sqrt()


def _square(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Return the sum of the squares of these parameters' gradients, in float64."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.get_total_norm(gradients).to(device=device, dtype=torch.float64).square()


def accumulate_in(dtype: torch.dtype | None, parameters: Iterable[nn.Parameter]) -> None:
    """Make autograd accumulate the gradients of half-precision parameters in `dtype`; ``None`` means the parameter's
    dtype.

    Parameters that already have a gradient are not changed.
    """
    for parameter in parameters:
        if parameter.grad is None and parameter.dtype in HALF_PRECISION:
            parameter.grad_dtype = dtype or parameter.dtype


def round_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Convert gradients that were accumulated in another dtype to their parameter's dtype, which optimizers expect."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.dtype != parameter.dtype:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
            parameter.grad = gradient.to(parameter.dtype)
