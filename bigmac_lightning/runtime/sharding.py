"""Weights that lie in shards on several ranks, by torch's `fully_shard` (FSDP2).

Between steps, a rank has its shard of each weight, a DTensor, and the optimizer sees only that. For computing, whole
weights are gathered: for a whole step, or for each block of layers when it runs. Gradients of whole weights are summed
over the ranks (never averaged) into the shards. Whole weights may be of a narrower type than shards; then gradients of
whole weights are float32. Shards and their gradients may lie in the CPU's memory; whole weights are on the device.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


class ShardedModule:
    """One module whose weights lie in shards on the ranks of a mesh.

    Blocks of layers can gather their weights whenever they run, and sum their gradients at once; all ranks must then
    run the same blocks in the same order. For other weights, `gather` and `reduce` do it.

    Attributes:
        whole: the whole weights by name, which have memory only while they are gathered.
        used: names of the weights that this rank has used in a backward since `forget_used`. The others have gradients
            of zeros only because other weights of their block were used.

    Args:
        module: the module, with whole weights that are the same on all ranks, or with this rank's rows of them.
        mesh: a mesh of one dimension, over which each weight is cut along its first dimension; the one of the rows.
        by_block: whether blocks gather their weights themselves.
        stages: if stages run instead of the module's own forward, the blocks of each stage, in their order. The weights
            beside them are then gathered by `gather` alone.
        computing: the 16-bit type of whole weights, if shards and gradients are float32; ``None``: all have the type of
            the module's weights.
        offload: whether shards and their gradients lie in the CPU's memory.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        by_block: bool,
        stages: Sequence[Sequence[nn.Module]] = (),
        computing: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        self.module, self._computing = module, computing
        # From pinned memory, a GPU copies while the CPU goes on. A CPU cannot pin memory without one.
        offloading = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
        policy = MixedPrecisionPolicy(  # inputs come in the type that they need, and what is float32 on purpose stays
            computing, None if computing is None else torch.float32, cast_forward_inputs=False
        )
        names = [name for name, _ in module.named_parameters()]
        stages = [stage for stage in stages if stage]
        blocks = [block for stage in stages for block in stage] if stages else list(blocks_of(module))
        self._by_themselves: list[FSDPModule] = []
        self._others: list[FSDPModule] = []
        with _without_rows(module):
            for part in [*blocks, module]:
                by_itself = by_block and not (part is module and stages)
                fully_shard(
                    part, mesh=mesh, reshard_after_forward=by_itself, mp_policy=policy, offload_policy=offloading
                )
                assert isinstance(part, FSDPModule)
                part.set_gradient_divide_factor(1.0)  # losses are divided by the step's counts already
                part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
                part.set_reduce_scatter_unused_params(True, recurse=False)  # ranks may have used different weights
                if not by_itself:
                    _let_reduce(part, False)
                (self._by_themselves if by_itself else self._others).append(part)
        if offload:
            _wait_before_adding([*self._by_themselves, *self._others])
        _state(module)._lazy_init()  # the module's own forward might never run, but only its layers'
        assert [name for name, _ in module.named_parameters()] == names, "sharding has changed names of parameters"
        for stage in stages if by_block else ():
            _set_apart(stage)
        self.whole: dict[str, nn.Parameter] = {}
        self.used: set[str] = set()
        self._held = False
        self._used_before: set[str] | None = None
        self._find_whole()

    def gather(self, counts: bool = True) -> None:
        """Let parts that do not do it themselves have whole weights until `release`. Collective over the mesh, if they
        have not.

        Args:
            counts: whether weights that get gradients until `reduce` are used.
        """
        if self._held:
            self.release()
        self._used_before = None if counts else set(self.used)
        if not all(group.is_unsharded for group in _groups(self._others)):
            for part in self._others:
                part.unshard()

    def start_gathering(self, backward: bool = False) -> None:
        """Start to gather the weights beside blocks and those of the first block, whose forwards come next, or of the
        last one, whose backwards do. Collective over the mesh."""
        *blocks, beside = self._by_themselves
        for part in [beside, *blocks[-1:]] if backward else [beside, *blocks[:1]]:
            part.unshard(async_op=True)

    def hold(self) -> None:
        """Let the module have all whole weights until `release`, so that ranks can run it as often as they like.
        Collective over the mesh, if it has not."""
        if self._held:
            return
        self.gather()
        for part in self._by_themselves:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        self._held = True

    def release(self) -> None:
        """Let the module have its shards again. Not collective."""
        for part in self._by_themselves if self._held else ():
            part.set_reshard_after_forward(True, recurse=False)
        self._held = False
        for part in (*self._by_themselves, *self._others):
            part.reshard()

    def reduce(self) -> None:
        """Sum the gradients of the weights that `gather` has gathered over the ranks, into the shards, which the module
        then has. Collective over the mesh."""
        groups = _groups(self._others)
        if not all(group.is_unsharded for group in groups):
            return
        self.used |= {name for name, parameter in self.whole.items() if parameter.grad is not None}
        if self._used_before is not None:
            self.used = self._used_before
        for part in self._others:
            _let_reduce(part, True)
        for group in groups:  # as torch.distributed.pipelining ends the backwards of a stage
            group.post_backward()
        for group in groups:
            group.finalize_backward()
        for part in self._others:
            _let_reduce(part, False)

    def forget_used(self) -> None:
        """Make `used` empty."""
        self.used.clear()

    def _find_whole(self) -> None:
        """Find the whole weights, which FSDP2 makes when it gathers them first and then keeps. Collective.

        Blocks that reduce their gradients themselves have none afterwards, so it is noted which of the weights get any.
        """
        for part in (*self._by_themselves, *self._others):
            part.unshard()
            whole = {id(p.unsharded_param) for group in _groups([part]) for p in group.fsdp_params}
            own = {name: p for name, p in self.module.named_parameters() if id(p) in whole}
            part.reshard()
            self.whole |= own
            if self._computing is not None:
                _sum_in_float32(part, own.values(), self._computing)
            for name, parameter in own.items() if part in self._by_themselves else ():
                trained = parameter.requires_grad
                parameter.requires_grad_()  # torch takes no hook of others, but they may be trained later
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.used.add(name))
                parameter.requires_grad_(trained)


@contextmanager
def _without_rows(module: nn.Module) -> Iterator[None]:
    """Within this context, whole parameters without memory take the place of rows. `fully_shard` cuts them as it cuts a
    model that was made on the meta device, and takes the rows for its shards when it runs first."""
    places: list[Any] = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if is_rows(p)]
    made: dict[int, nn.Parameter] = {}
    for place, name, rows in places:
        if id(rows) not in made:  # a parameter may have several places
            empty = torch.empty(rows.shape, dtype=rows.dtype, device="meta")
            made[id(rows)] = nn.Parameter(empty, rows.requires_grad)
        place._parameters[name] = made[id(rows)]
    yield
    for place, name, rows in places:
        place._parameters[name] = rows


def _state(part: Any) -> Any:
    return part._get_fsdp_state()


def _groups(parts: Sequence[FSDPModule]) -> list[Any]:
    """FSDP2's groups of parameters that are gathered together."""
    return [group for part in parts for group in _state(part)._fsdp_param_groups]


def _let_reduce(part: FSDPModule, reduces: bool) -> None:
    """Set whether a backward of a part sums its gradients and releases its whole weights."""
    part.set_requires_gradient_sync(reduces, recurse=False)
    part.set_reshard_after_backward(reduces, recurse=False)


def _set_apart(stage: Sequence[Any]) -> None:
    """Let the blocks of a stage be a whole to FSDP2: the end of a backward is the end of theirs only, and each block
    starts to gather the weights of the next one before it computes."""
    context = type(_state(stage[0])._state_ctx)()
    for block in stage:
        _state(block)._state_ctx = context
        context.all_states.append(_state(block))
    for block, following in pairwise(stage):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    # FSDP2 would choose one by the order of the last forwards, which were those of other microbatches. Its own weights
    # are there already.
    stage[0].set_modules_to_backward_prefetch([stage[0]])


def _sum_in_float32(part: FSDPModule, whole: Iterable[nn.Parameter], computing: torch.dtype) -> None:
    """Let autograd add up gradients of a part's whole weights in float32.

    FSDP2 itself would add those of one step up in the weights' type, until the first call of `post_backward`.
    """
    for parameter in whole:
        parameter.grad_dtype = torch.float32
    for group in _groups([part]):
        for parameter in group.fsdp_params:
            parameter.sharded_param.computing_dtype = computing
            parameter.__class__ = _Float32Gradients


def _wait_before_adding(parts: Sequence[FSDPModule]) -> None:
    """Let a gradient be in the CPU's memory before another one is added to it there.

    A block that runs several times before a backward reduces its gradients as often in it. FSDP2 waits for the first
    copy at the end of the backward only.
    """
    for group in _groups(parts):
        group.post_backward = partial(_post_backward, group, group.post_backward)


def _post_backward(group: Any, post_backward: Callable[..., None], *unused: Any) -> None:
    for parameter in group.fsdp_params:
        if parameter.grad_offload_event is not None:
            parameter.grad_offload_event.synchronize()
            parameter.grad_offload_event = None
    post_backward(*unused)


class _Float32Gradients(FSDPParam):
    """A parameter of FSDP2 whose gradient of zeros, if it was not used, is of the type of the other gradients."""

    @property
    def unsharded_zero_grad_data(self) -> Tensor:
        return torch.zeros_like(self.unsharded_param, dtype=torch.float32)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a module: the members of its outermost lists and dicts of modules that have weights."""
    for found in lists_of(module):
        yield from (member for member in found.children() if has_weights(member))


def lists_of(module: nn.Module) -> Iterator[nn.ModuleList | nn.ModuleDict]:
    """Yield the outermost lists and dicts of modules in a module."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield child
        else:
            yield from lists_of(child)


def has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def is_slice(tensor: Tensor) -> bool:
    """Whether each tensor peer has its own slice of it."""
    return isinstance(tensor, DTensor) and "tp" in (tensor.device_mesh.mesh_dim_names or ())


def is_rows(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a rank has only its rows of a weight, before shards are made of weights or after."""
    return isinstance(tensor, DTensor) and not is_slice(tensor)


def local(tensor: Tensor) -> Tensor:
    """The tensor's part on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(tensor: Tensor) -> Tensor:
    """The whole tensor, of which this rank has a part. Collective over the ranks that have the parts."""
    if not isinstance(tensor, DTensor):
        return tensor
    moved: Any = tensor.to(tensor.device_mesh.device_type)  # offloaded shards are on the CPU, and cannot be sent there
    if tensor.device_mesh.ndim == 2:  # shards of slices: first the slices, as torch warns of both at a time
        moved = moved.redistribute(placements=[Replicate(), tensor.placements[1]])
    return moved.full_tensor()


def shard_like(whole: Any, parameter: Any) -> Any:
    """The part of a whole tensor, or of a tensor peer's slice of it, that a parameter's rank has, placed as the
    parameter is; the value itself if it is none of a parameter in shards, or of another shape. Nothing is sent."""
    if not (isinstance(whole, Tensor) and isinstance(parameter, DTensor) and whole.shape == parameter.shape):
        return whole
    mesh, placements, device = parameter.device_mesh, parameter.placements, parameter.device
    with torch.no_grad():
        if not isinstance(whole, DTensor):  # torch cuts it on the mesh's device
            return distribute_tensor(whole, mesh, placements, src_data_rank=None).to(device)
        if whole.device_mesh == mesh or mesh.ndim == 1:
            return whole
        assert mesh.mesh_dim_names is not None  # the ranks that share a slice, and the tensor peers
        shard = distribute_tensor(whole.to_local(), mesh[mesh.mesh_dim_names[0]], [Shard(0)], src_data_rank=None)
        return DTensor.from_local(
            shard.to_local(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        ).to(device)
