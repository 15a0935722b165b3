"""Weights that lie in shards on several ranks, by torch's `fully_shard` (FSDP2).

Between steps, a rank has its shard of each weight, a DTensor, and the optimizer sees only that. For computing, whole
weights are gathered: for a whole step, or for each block of layers when it runs. Gradients of whole weights are summed
over the ranks (never averaged) into the shards. Whole weights may be of a narrower type than shards; then gradients of
whole weights are float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedModule:
    """One module whose weights lie in shards on the ranks of a mesh.

    Attributes:
        whole: the whole weights by name, which have memory only while they are gathered.
        used: names of the weights that this rank has used in a backward since `forget_used`. The others have gradients
            of zeros only because other weights of their block were used.

    Args:
        module: the module, with whole weights that are the same on all ranks.
        mesh: a mesh of one dimension, over which each weight is cut along its first dimension.
        by_block: whether each block of layers gathers its weights whenever it runs, and sums its gradients at once.
            All ranks must then run the same blocks in the same order. Otherwise `gather` and `reduce` do it.
        computing: the 16-bit type of whole weights, if shards and gradients are float32; ``None``: all have the type of
            the module's weights.
    """

    def __init__(
        self, module: nn.Module, mesh: DeviceMesh, by_block: bool, computing: torch.dtype | None = None
    ) -> None:
        self.module, self.by_block, self._computing = module, by_block, computing
        policy = MixedPrecisionPolicy(  # inputs come in the type that they need, and what is float32 on purpose stays
            computing, None if computing is None else torch.float32, cast_forward_inputs=False
        )
        names = [name for name, _ in module.named_parameters()]
        self._parts: list[FSDPModule] = []
        for part in [*blocks_of(module), module]:
            fully_shard(part, mesh=mesh, reshard_after_forward=by_block, mp_policy=policy)
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)  # losses are divided by the step's counts already
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
            self._parts.append(part)
        whole = self._parts[-1]
        whole.set_reduce_scatter_unused_params(True)  # ranks may have used different weights
        if not by_block:
            whole.set_requires_gradient_sync(False)
            whole.set_reshard_after_backward(False)
        whole._get_fsdp_state()._lazy_init()  # the module's own forward might never run, but only its layers'
        assert [name for name, _ in module.named_parameters()] == names, "sharding has changed names of parameters"
        self.whole: dict[str, nn.Parameter] = {}
        self.used: set[str] = set()
        self._find_whole()

    @property
    def _groups(self) -> list[Any]:
        """FSDP2's groups of parameters that are gathered together."""
        return [group for part in self._parts for group in part._get_fsdp_state()._fsdp_param_groups]

    @property
    def gathered(self) -> bool:
        """Whether the module has whole weights now."""
        return all(group.is_unsharded for group in self._groups)

    def gather(self) -> None:
        """Let the module have whole weights until `release`. Collective over the mesh, if it has not."""
        if not self.gathered:
            for part in self._parts:
                part.unshard()

    def release(self) -> None:
        """Let the module have its shards again. Not collective."""
        for part in self._parts:
            part.reshard()

    def reduce(self) -> None:
        """Sum the gradients of the whole weights over the ranks, and add them to those of the shards; then `release`.
        Collective over the mesh. It does nothing if blocks do it by themselves."""
        if self.by_block or not self.gathered:
            return
        self.used |= {name for name, parameter in self.whole.items() if parameter.grad is not None}
        whole = self._parts[-1]
        whole.set_requires_gradient_sync(True)
        whole.set_reshard_after_backward(True)
        for group in self._groups:  # as torch.distributed.pipelining ends the backwards of a stage
            group.post_backward()
        for group in self._groups:
            group.finalize_backward()
        whole.set_requires_gradient_sync(False)
        whole.set_reshard_after_backward(False)

    def forget_used(self) -> None:
        """Make `used` empty."""
        self.used.clear()

    def _find_whole(self) -> None:
        """Find the whole weights, which FSDP2 makes when it gathers them first and then keeps. Collective.

        Blocks reduce gradients themselves, so it is noted which of the weights get any.
        """
        for part in self._parts:
            part.unshard()
            own = {name: p for name, p in self.module.named_parameters() if not isinstance(p, DTensor)}
            part.reshard()
            self.whole |= own
        if self._computing is not None:
            self._sum_in_float32()
        for name, parameter in self.whole.items() if self.by_block else ():
            trained = parameter.requires_grad
            parameter.requires_grad_()  # torch takes no hook of others, but they may be trained later
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.used.add(name))
            parameter.requires_grad_(trained)

    def _sum_in_float32(self) -> None:
        """Let autograd add up gradients of whole weights in float32.

        FSDP2 itself would add those of one step up in the weights' type, until the first call of `post_backward`.
        """
        for parameter in self.whole.values():
            parameter.grad_dtype = torch.float32
        for shard in self.module.parameters():
            shard.computing_dtype = self._computing  # pyright: ignore[reportAttributeAccessIssue]
        for group in self._groups:
            for parameter in group.fsdp_params:
                parameter.__class__ = _Float32Gradients


class _Float32Gradients(FSDPParam):
    """A parameter of FSDP2 whose gradient of zeros, if it was not used, is of the type of the other gradients."""

    @property
    def unsharded_zero_grad_data(self) -> Tensor:
        return torch.zeros_like(self.unsharded_param, dtype=torch.float32)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a module: the members of its outermost lists and dicts of modules that have weights."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from (member for member in child.children() if next(member.parameters(), None) is not None)
        else:
            yield from blocks_of(child)


def local(tensor: Tensor) -> Tensor:
    """The tensor's part on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Any, parameter: Any) -> Any:
    """The shard of a whole tensor that a parameter's rank has, placed as the parameter is; the value itself if it is
    none of a parameter in shards, or of another shape. Nothing is sent."""
    alike = isinstance(whole, Tensor) and isinstance(parameter, DTensor) and whole.shape == parameter.shape
    if not alike or isinstance(whole, DTensor):
        return whole
    moved = whole.to(parameter.device)
    with torch.no_grad():
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
