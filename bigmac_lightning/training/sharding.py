"""Shards the weights of a PipelineModule's components over ranks, as the strategy's options say."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from bigmac_lightning.contracts.batch import MediaData, TargetItem
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.runtime.gradients import SharedParameters
from bigmac_lightning.runtime.mesh import PipelineMesh
from bigmac_lightning.runtime.sharding import ShardedModule, has_weights, is_rows, is_slice, lists_of
from bigmac_lightning.training.options import ShardingOptions

Item = TypeVar("Item")

FORWARDS = ("sample", "decode")
"""Methods of generators that run their weights outside of `forward`."""


class Sharding:
    """The components of a module whose weights lie in shards.

    Attributes:
        sharded: these components by name, such as "encoders.image" or "llm".
        computing: see the argument.

    Args:
        module: the module with this rank's part of the LLM, with whole weights.
        mesh: the process groups.
        options: what is sharded.
        own_stages: the layers of each of this rank's stages.
        computing: the 16-bit type of whole weights if shards are float32 (`ShardingOptions.master_weights`).

    Raises:
        ValueError: a component cannot be sharded so; the message says why, and what to change.
    """

    def __init__(
        self,
        module: PipelineModule,
        mesh: PipelineMesh,
        options: ShardingOptions,
        own_stages: Sequence[range],
        computing: torch.dtype | None = None,
    ) -> None:
        self._mesh, self.sharded, self._meeting = mesh, dict[str, ShardedModule](), set[str]()
        self.computing, self._options = computing, options
        self._shared = _shared_by_components(module)
        chosen = [(name, part, options.of_component(name)) for name, part in _components(module)]
        _check_apart([(name, part) for name, part, kind in chosen if kind != "ddp"], module)
        meshes = {**shard_meshes(module, mesh, options), **module.part.shards}  # rows lie on the latter already
        for name, part, kind in chosen:
            over, offload = meshes.get(name), options.offloads(name)
            if over is None:
                continue
            if kind == "fsdp" and (name != "llm" or over.size() > 1):
                self._meeting.add(name)
                if name != "llm":
                    _check_meetings(name, part)
            if next(part.parameters(), None) is not None:  # otherwise it uses the weights of another encoder
                stages = _blocks_by_stage(module.llm, own_stages) if (name, kind) == ("llm", "fsdp") else ()
                self.sharded[name] = ShardedModule(part, over, kind == "fsdp", stages, computing, offload)
                if isinstance(part, Generator):
                    for method in FORWARDS:
                        if hasattr(part, method):
                            register_fsdp_forward_method(part, method)

    def gather(self, has_loss: bool = True) -> None:
        """Let weights be whole that do not gather themselves, until `reduce` or `release`. Collective over all ranks,
        if they are not.

        Args:
            has_loss: whether this pipeline will have a loss. It may run without one, because others have one.
        """
        for sharded in self.sharded.values():
            sharded.gather(has_loss)

    def start_gathering(self, name: str, backward: bool = False) -> None:
        """Start to gather what a component needs first, whose forward or backward all ranks of the pipeline run
        together, soon."""
        if name in self.sharded:
            self.sharded[name].start_gathering(backward)

    def hold(self) -> None:
        """Let all weights be whole that lie in shards on several pipelines, until `release`: in an evaluation, these
        may have different numbers of batches. Collective over all ranks, if they are not."""
        for name, sharded in self.sharded.items():
            if name == "llm" or not self.meets(name):
                sharded.hold()

    def early(self, splits: bool) -> Mapping[str, Callable[[], None]]:
        """What sums gradients into shards before the end of a step, by the part of the model that is done then.

        It may block until all replicas are there, while the other ranks of this pipeline wait for this one inside an
        encoder. Then no rank may be done before another one in one replica and after it in the next. Whole backwards
        end from the last stage to the first in all of them; weight gradients that are computed apart need not.

        Args:
            splits: whether backwards are split into input and weight gradients.
        """
        known = "llm" in self.sharded and not self.meets("llm") and not self._options.offloads("llm")
        return {"llm": self.sharded["llm"].reduce} if known and not (splits and self._meeting) else {}

    def reduce(self) -> None:
        """Sum gradients that are still to be summed into the shards, which the module then has. Collective over all
        ranks."""
        for sharded in self.sharded.values():
            sharded.reduce()

    def release(self) -> None:
        """Let the module have its shards, which optimizers and checkpoints need."""
        for sharded in self.sharded.values():
            sharded.release()

    def forget_used(self) -> None:
        """Forget which weights were used: an optimizer's step begins."""
        for sharded in self.sharded.values():
            sharded.forget_used()

    def whole(self) -> list[nn.Parameter]:
        """The whole weights of which this rank has shards."""
        return [parameter for sharded in self.sharded.values() for parameter in sharded.whole.values()]

    def lacks_master(self, name: str) -> bool:
        """Whether master weights are wanted, but a parameter has none, as its component does not lie in shards."""
        return self.computing is not None and self._options.of_component(name) == "ddp"

    def meets(self, name: str) -> bool:
        """Whether ranks must run a component together: all ranks of a pipeline one such as "encoders.image", all ranks
        of equal place the "llm"."""
        return name in self._meeting

    def calls(self, own: int) -> int:
        """How often every rank of the pipeline must run a component, if this rank has work for `own` calls. Collective
        over the pipeline."""
        if self._mesh.host_group is None:  # a single rank
            return own
        most = torch.tensor(own)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._mesh.host_group)
        return int(most)

    def places(self, trained: Mapping[str, nn.Parameter], tied: Mapping[str, Any]) -> list[SharedParameters]:
        """Which ranks have which of this rank's trained parameters.

        Args:
            trained: the parameters by their names in the module.
            tied: names of parameters of which the first and the last stage's ranks have copies.
        """
        mesh, found = self._mesh, list[SharedParameters]()
        world = dist.group.WORLD if _ranks() > 1 or self.sharded else None
        replicas = mesh.dp_group if mesh.dp_size > 1 else None
        data = mesh.data_group if mesh.dp_size * mesh.cp_size > 1 or "llm" in self.sharded else None
        llm = {name: p for name, p in trained.items() if name.startswith("llm.")}
        rest = {name: p for name, p in trained.items() if name not in llm}
        for prefix, sharded in self.sharded.items():
            if prefix == "llm":
                continue
            own = {name: rest.pop(name) for name in list(rest) if name.startswith(f"{prefix}.")}
            summed, copies = (replicas, mesh.dp_size) if self.meets(prefix) else (None, 1)
            # Weights that were whole during a step get their gradients at its end. If stages gather weights from the
            # other replicas during the step, sums over the same group would come between. Sums of gradients on the CPU
            # would let ranks wait for each other in the middle of their plans.
            offloaded = self._options.offloads(prefix)
            early = self.meets(prefix) and not self.meets("llm") and not offloaded
            part = prefix.partition(".")[0] if early else "rest"
            used = _Used(prefix, sharded)
            found.append(SharedParameters(own, world, summed, copies, used, part, offloaded))
        for kind in ("generators", "encoders"):
            own = {name: p for name, p in rest.items() if name.startswith(f"{kind}.")}
            for part, names in self._by_time(own, kind):
                found.append(SharedParameters(names, world, world, _ranks(), part=part))
        copied = {name: p for name, p in llm.items() if name in tied}
        single = {name: p for name, p in llm.items() if name not in tied}
        sharded = self.sharded.get("llm")
        used = None if sharded is None else _Used("llm", sharded)
        copies, offloaded = mesh.dp_size * mesh.cp_size if sharded is None else 1, self._options.offloads("llm")
        for own, group, times, part in ((single, data, 1, "llm"), (copied, mesh.tied_group, 2, "rest")):
            # Tensor peers have slices, or the same weights with the same gradients.
            slices = {name: p for name, p in own.items() if is_slice(p)}
            whole = {name: p for name, p in own.items() if name not in slices}
            summed = group if sharded is None else None if own is single else mesh.tied_pair
            for when, names in self._by_time(slices, part if sharded is None else "rest"):
                found.append(SharedParameters(names, group, summed, times * copies, used, when, offloaded))
            for when, names in self._by_time(whole, part if sharded is None else "rest"):
                number = times * copies * mesh.tp_size
                found.append(SharedParameters(names, group, summed, number, used, when, offloaded))
        return found

    def _by_time(self, own: Mapping[str, nn.Parameter], part: str) -> list[tuple[str, dict[str, nn.Parameter]]]:
        """The parameters whose gradients are there when a step is done with a part, and those that get more from
        another component, and are there at the end only."""
        early = {name: p for name, p in own.items() if name not in self._shared}
        return [(part, early), ("rest", {name: p for name, p in own.items() if name in self._shared})]


def shard_meshes(module: PipelineModule, mesh: PipelineMesh, options: ShardingOptions) -> dict[str, DeviceMesh]:
    """For each component whose weights lie in shards, such as "encoders.image" or "llm", the ranks that have them."""
    world: Any = dist.group.WORLD
    over_world, over_pipeline = (
        DeviceMesh.from_group(group, mesh.device.type) for group in (world, mesh.replica_group)
    )
    found = dict[str, DeviceMesh]()
    for name, _ in _components(module):
        kind = options.of_component(name)
        over = mesh.data_mesh if name == "llm" else over_world if kind == "zero1" else over_pipeline
        # One rank alone may have float32 weights, or weights on the CPU, as its shard.
        if kind != "ddp" and (over.size() > 1 or options.master_weights or options.offloads(name)):
            found[name] = over
    return found


def _components(module: PipelineModule) -> list[tuple[str, nn.Module]]:
    parts = [("encoders", module.encoders), ("generators", module.generators)]
    found = [(f"{kind}.{name}", part) for kind, named in parts for name, part in named.items()]
    return [*found, ("llm", module.llm)]


class Together:
    """Runs components whose weights all ranks of a pipeline gather together: each rank makes as many calls as the rank
    with the most batches. A rank that has no batch left runs a smallest item. That changes neither results nor
    gradients.

    Args:
        calls: gives the number of calls on all ranks from that of this rank.
        device: where components run.
    """

    def __init__(self, calls: Callable[[int], int], device: torch.device) -> None:
        self._calls, self._device = calls, device

    def encode(self, encoder: Encoder, pixels: Sequence[MediaData], rows: Sequence[int]) -> Tensor:
        """The features of items, [rows, width], as `encoder(pixels)` gives them; there may be no items.

        Args:
            rows: number of rows of each item.
        """
        batches, made = encoder.batches(pixels) if pixels else [], dict[int, Tensor]()
        calls = self._calls(len(batches))
        for batch in batches:
            encoded = encoder([pixels[i] for i in batch])
            made.update(zip(batch, encoded.split([rows[i] for i in batch]), strict=True))
        missing = [encoder([self._moved(encoder.smallest())]) for _ in range(calls - len(batches))]
        features = torch.cat([made[i] for i in range(len(pixels))]) if made else missing[0][:0]
        return features + sum(map(nothing_of, missing)) if missing else features

    def generate(
        self, generator: Generator, conditions: Sequence[Tensor], items: Sequence[TargetItem], through: bool
    ) -> Tensor:
        """The sum of the items' losses, as `generator(conditions, items)` gives it; there may be no items.

        Args:
            through: whether conditions need gradients, on all ranks alike. That of a smallest item gets one, too, so
                that blocks have the same backwards on all ranks.
        """
        batches = generator.batches(items) if items else []
        calls = self._calls(len(batches))
        losses = [generator([conditions[i] for i in batch], [items[i] for i in batch]) for batch in batches]
        for _ in range(calls - len(batches)):
            condition, item = self._moved(generator.smallest())
            losses.append(nothing_of(generator([condition.requires_grad_(through)], [item])))
        return torch.stack(losses).sum()

    def sample(self, generator: Generator, conditions: Sequence[Tensor], items: Sequence[TargetItem]) -> list[Tensor]:
        """One tensor per item, as `generator.sample(conditions, items)` gives them; there may be no items."""
        batches, made = generator.batches(items) if items else [], dict[int, Tensor]()
        calls = self._calls(len(batches))
        for batch in batches:
            samples = generator.sample([conditions[i] for i in batch], [items[i] for i in batch])
            made.update(zip(batch, samples, strict=True))
        for _ in range(calls - len(batches)):
            condition, item = self._moved(generator.smallest())
            generator.sample([condition], [item])
        return [made[i] for i in range(len(items))]

    def _moved(self, smallest: Item) -> Item:
        """What a component makes on the CPU, on the device."""
        return move_data_to_device(smallest, self._device)


def nothing_of(tensor: Tensor) -> Tensor:
    """Zero, a scalar, whose backward passes through all that made the tensor, with gradients of zero. The tensor's own
    values do not matter, even if they are infinite."""
    return tensor.flatten()[:0].sum()


class _Used:
    """The names, in the whole module, of the shards that were used."""

    def __init__(self, prefix: str, sharded: ShardedModule) -> None:
        self._prefix, self._sharded = prefix, sharded

    def __call__(self) -> set[str]:
        return {f"{self._prefix}.{name}" for name in self._sharded.used}


def check_whole(module: PipelineModule) -> None:
    """
    Raises:
        ValueError: an earlier run has left the module's weights in shards, or rows of them.
    """
    known = {id(mesh) for mesh in module.part.shards.values()}
    rows = [parameter for parameter in module.parameters() if is_rows(parameter)]
    in_shards = any(isinstance(child, FSDPModule) for child in module.modules())
    if in_shards or any(id(parameter.device_mesh) not in known for parameter in rows):
        raise ValueError(
            f"the weights of this {type(module).__name__} lie in shards already, from an earlier run: save a "
            f"checkpoint, and give a new {type(module).__name__} to this run, with ckpt_path"
        )


def _ranks() -> int:
    return dist.get_world_size()


def _blocks_by_stage(llm: LanguageModel, own_stages: Sequence[range]) -> list[list[nn.Module]]:
    """The layers with weights of each of this rank's stages, in their order.

    They are the members of an outermost list or dict of modules, which has one for each of the LLM's layers, or for
    each of this rank's.

    Raises:
        ValueError: there is none.
    """
    own = [layer for stage in own_stages for layer in stage]
    every = [list(found.children()) for found in lists_of(llm)]
    fitting = [members for members in every if len(members) in (llm.num_layers, len(own)) and members]
    if not own:
        return []
    if not fitting:
        raise ValueError(
            f"sharding.stages is fsdp, but {type(llm).__name__} has no list of modules (nn.ModuleList) with its "
            f"{llm.num_layers} layers: use zero1, or keep the layers in one"
        )
    layers = max(fitting, key=lambda members: sum(p.numel() for member in members for p in member.parameters()))
    numbers = range(llm.num_layers) if len(layers) == llm.num_layers else sorted(own)
    layer_of = dict(zip(numbers, layers, strict=True))
    return [[layer_of[k] for k in stage if has_weights(layer_of[k])] for stage in own_stages]


def _shared_by_components(module: PipelineModule) -> set[str]:
    """The names of parameters that components of different kinds (encoders, LLM, generators) have together."""
    kinds, names = dict[int, set[str]](), list(module.named_parameters(remove_duplicate=False))
    for name, parameter in names:
        kinds.setdefault(id(parameter), set()).add(name.partition(".")[0])
    return {name for name, parameter in names if len(kinds[id(parameter)]) > 1}


def _check_apart(sharded: Sequence[tuple[str, nn.Module]], module: PipelineModule) -> None:
    """Check that a component that is to be sharded shares no weight with another one."""
    for prefix, part in sharded:
        own = {id(parameter) for parameter in part.parameters()}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) in own and not name.startswith(f"{prefix}."):
                raise ValueError(
                    f"{prefix} and {name} share a weight, so it cannot lie in shards: set sharding of "
                    f"{prefix.partition('.')[0]} to ddp"
                )


def _check_meetings(name: str, part: nn.Module) -> None:
    assert isinstance(part, Encoder | Generator)
    for child_name, child in part.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training and child.track_running_stats:
            raise ValueError(
                f"{name}.{child_name} is a batch norm in training mode, whose statistics would count the smallest "
                "items that ranks without work run under fsdp: use ddp or zero1, or freeze it (eval mode)"
            )
    part.smallest()  # it raises an error if the component has none
