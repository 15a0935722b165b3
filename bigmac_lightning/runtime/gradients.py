"""Sums gradients over the ranks that have the same parameter, and computes the norm of all gradients of the model.

Each loss is divided by the step's global counts before its backward, so gradients are summed and never averaged. A
parameter that no rank used keeps ``grad=None``, as it would in one process, so that its optimizer skips it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigmac_lightning.host import from_host
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.sharding import is_slice, local

HALF_PRECISION = (torch.bfloat16, torch.float16)

LARGE = 2**20
"""Number of elements from which a gradient is summed in place, and not copied into a bucket with others: the copies of
buckets are kept until the end of a step."""


@dataclass(frozen=True)
class SharedParameters:
    """Trainable parameters of this rank, all of which the same ranks have.

    Attributes:
        parameters: by name; whole ones, or this rank's shards.
        everyone: process group of all ranks that have the parameters, or shards of them; ``None`` if only this rank has
            them.
        summed: process group of the ranks that have the same parameters, or the same shards, and must still sum their
            gradients; ``None`` if there is nothing to sum.
        copies: how many ranks of the world have each number of the parameters.
        used: gives the names of those shards that this rank has used; ``None``: those that have a gradient.
        part: to which part of the model, of `PARTS`, they belong; "rest" if they are offloaded.
        offloaded: whether they and their gradients lie in the CPU's memory.
    """

    parameters: Mapping[str, nn.Parameter]
    everyone: dist.ProcessGroup | None
    summed: dist.ProcessGroup | None
    copies: int
    used: Callable[[], Collection[str]] | None = None
    part: str = "llm"
    offloaded: bool = False


PARTS = ("generators", "llm", "encoders", "rest")
"""The parts of a model whose gradients are summed together, in the order in which a step is done with them. The rest
is there only at its end: shards of weights that were whole during it, and weights of which two stages have copies."""


class Reductions:
    """Replaces gradients by their sums over all ranks that have the parameters, in the background, part by part.

    All ranks must use it, and have the same parts; they may be done with them in any order.

    Args:
        places: which ranks have which parameters.
        mesh: the process groups.
        before: by part, what is called first when its sums start.
    """

    def __init__(
        self,
        places: Sequence[SharedParameters],
        mesh: PipelineMesh,
        before: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        self._places, self._device, self._before = places, mesh.device, before or {}
        self._left, self._done = list(PARTS), set[str]()
        self._used: list[tuple[SharedParameters, Tensor]] = []
        self._works: list[dist.Work | None] = []
        self._flat: list[tuple[Tensor, list[Tensor]]] = []

    def done(self, part: str) -> None:
        """Say that this rank has all its gradients of a part of `PARTS`. All ranks sum the parts in the same order, so
        a part waits for those before it."""
        self._done.add(part)
        while self._left and self._left[0] in self._done:
            self._start(self._left.pop(0))

    def all_computed(self) -> None:
        """Say that this rank has all gradients but the rest."""
        for part in PARTS[:-1]:
            self.done(part)

    def finish(self) -> None:
        """Sum what is left, wait for all sums, and take away those that no rank has used."""
        self.wait()
        self.drop_unused()

    def wait(self) -> None:
        """Sum what is left, and wait for all sums."""
        for part in PARTS:
            self.done(part)
        for work in self._works:
            if work is not None:
                work.wait()
        for flat, gradients in self._flat:
            _copy_into(gradients, flat)

    def drop_unused(self, *further: Tensor) -> list[int]:
        """Take away the gradients that no rank has used.

        Args:
            further: scalars of int32 on the device.

        Returns: the values of `further`. The host waits for the device once, for all it reads.
        """
        known = [*(used for _, used in self._used), *(scalar.reshape(1) for scalar in further)]
        if not known:
            return []
        flags = iter(torch.cat(known).tolist())
        for place, _ in self._used:
            for parameter in place.parameters.values():
                if not next(flags):
                    parameter.grad = None  # no rank has used it: these are zeros
        return list(flags)

    def _start(self, part: str) -> None:
        if part in self._before:
            self._before[part]()
        for place in self._places:
            if place.part != part or not place.parameters or place.everyone is None:
                continue
            known = None if place.used is None else place.used()
            flags = [p.grad is not None if known is None else name in known for name, p in place.parameters.items()]
            used = from_host(flags, torch.int32, self._device)
            self._works.append(dist.all_reduce(used, dist.ReduceOp.MAX, group=place.everyone, async_op=True))
            self._used.append((place, used))
            if place.summed is not None:
                buckets = _buckets(_gradients(place.parameters.values()))
                (self._sum_offloaded if place.offloaded else self._sum)(buckets, place.summed)

    def _sum(self, buckets: Iterable[list[Tensor]], group: dist.ProcessGroup) -> None:
        """Start to sum gradients."""
        for bucket in buckets:
            flat = bucket[0] if len(bucket) == 1 and bucket[0].is_contiguous() else None
            if flat is None:
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                self._flat.append((flat, bucket))
            self._works.append(dist.all_reduce(flat, group=group, async_op=True))

    def _sum_offloaded(self, buckets: Iterable[list[Tensor]], group: dist.ProcessGroup) -> None:
        """Sum gradients that lie on the CPU, where groups of GPUs have no sums. The device has one bucket at a time."""
        for bucket in buckets:
            flat = torch.cat([gradient.flatten() for gradient in bucket]).to(self._device)
            dist.all_reduce(flat, group=group)
            _copy_into(bucket, flat.to(bucket[0].device))


def reduce_gradients(places: Sequence[SharedParameters], mesh: PipelineMesh) -> None:
    """Replace every gradient by its sum over all ranks that have the parameter. Collective: all ranks must call it."""
    Reductions(places, mesh).finish()


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's parts of the gradients of these parameters. A rank that did not use one contributes zeros."""
    found: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        found.append(local(parameter.grad))
    return found


def _copy_into(gradients: Sequence[Tensor], flat: Tensor) -> None:
    """Copy the numbers of a flat tensor, one gradient after another."""
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield large gradients alone, and the others in lists of one dtype each."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel() >= LARGE:
            yield [gradient]
            continue
        bucket = by_type.setdefault(gradient.dtype, [])
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= LARGE:
            yield by_type.pop(gradient.dtype)
    yield from by_type.values()


def global_norm(places: Sequence[SharedParameters], mesh: PipelineMesh) -> Tensor:
    """Return the 2-norm of all gradients of the model, a float64 scalar that is equal on every rank. Collective over
    all ranks. Each number counts once. `reduce_gradients` must have been called before.
    """
    square = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for place in places:
        square += _square(list(place.parameters.values()), mesh.device) / place.copies
    if dist.get_world_size() > 1:
        dist.all_reduce(square)
    return square.sqrt()


def _square(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Return the sum of the squares of these parameters' gradients on this rank, in float64."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.get_total_norm(gradients).to(device=device, dtype=torch.float64).square()


def unequal_gradients(
    parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup, device: torch.device
) -> list[str]:
    """The names of those whole parameters whose gradients are not the same on all ranks of a group, but for rounding.

    Tensor peers compute the same gradient of a parameter that they all have, unless the model's plan has left out a
    parameter of which each of them has a part of the gradient. Collective: all ranks must have the same gradients.

    Args:
        device: a device on which the group's ranks can send to each other.
    """
    found = [(n, local(p.grad)) for n, p in parameters.items() if p.grad is not None and not is_slice(p)]
    if not found:
        return []
    norms = torch.stack([gradient.detach().double().norm().to(device) for _, gradient in found])
    largest, least = norms.clone(), norms.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    # A gradient that is nothing but rounding beside the others (that of a bias of keys) may differ.
    unequal = (largest - least) > torch.maximum(1e-3 * largest, 1e-6 * largest.max())
    return [name for (name, _), bad in zip(found, unequal.tolist(), strict=True) if bad]


def clip_gradients(parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scale gradients, whose norm in the whole model is `norm`, so that it becomes `most` if it is more.

    It is ``torch.nn.utils.clip_grads_with_norm_``, which does not take shards on different sets of ranks together.
    """
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    for some in by_device(gradients):
        torch._foreach_mul_(some, factor.to(some[0].device))  # pyright: ignore[reportPrivateImportUsage]


def by_device(tensors: Iterable[Tensor]) -> Collection[list[Tensor]]:
    """The tensors of each device: those of offloaded weights are on the CPU."""
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found.values()


def accumulate_in(dtype: torch.dtype | None, parameters: Iterable[nn.Parameter]) -> None:
    """Make autograd accumulate the gradients of half-precision parameters in `dtype`; ``None`` means the parameter's
    dtype.

    Parameters that already have a gradient are not changed.
    """
    for parameter in parameters:
        is_shard = isinstance(parameter, DTensor)  # FSDP2 sums in the type of its own policy
        if parameter.grad is None and parameter.dtype in HALF_PRECISION and not is_shard:
            parameter.grad_dtype = dtype or parameter.dtype


def round_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Convert gradients that were accumulated in another dtype to their parameter's dtype, which optimizers expect."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.dtype != parameter.dtype:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
            parameter.grad = gradient.to(parameter.dtype)
