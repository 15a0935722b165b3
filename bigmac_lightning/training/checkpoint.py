"""Checkpoints that all ranks write together and any number of ranks can read: a directory in torch's DCP format, or one
file.

A directory has these keys in DCP: "model", the weights; "optimizer_0", ..., the moments; "others", further tensors that
are keyed by names of the model's tensors, such as a callback's moving average. Everything else is in Lightning's
metadata file. A single file is what Lightning writes in one process, except that optimizer states are keyed by
parameter names. All functions use torch.distributed's default group, and also work in one process without any.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.mismatches import first_few, mismatches
from bigmac_lightning.checkpoints.packed import in_one_piece, is_packed
from bigmac_lightning.checkpoints.parts import MODEL, OTHERS, Names, Tree, complete, joined, nested, split
from bigmac_lightning.checkpoints.reading import single_process_dcp
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.runtime.sharding import shard_like, whole_of


def names_of(module: PipelineModule) -> Names:
    """The names of the whole model's tensors. Collective."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    own = {name for name, _ in tensors} | set(module.state_dict())
    return Names.of(own, from_everyone(own), module.tied_copies)


def save_directory(checkpoint: Tree, path: Path, names: Names, replica: int) -> None:
    """Write a checkpoint directory. Collective.

    Everything is written beside `path` first and moved there when it is complete, so an interrupted save leaves the
    old checkpoint as it was.

    Args:
        checkpoint: this rank's part, as Lightning makes it.
        replica: data-parallel replica that this rank belongs to; what the first replica has is saved.
    """
    tensors, rest = _apart(checkpoint, names)
    rest = _joined(rest, names, replica)
    tensors = nested({place: in_one_piece(value) for place, value in _leaves(tensors)})
    place = on_first_rank(lambda: files.unfinished(path))
    with single_process_dcp():
        dcp_save(tensors, checkpoint_id=place, no_dist=not dist.is_initialized())
    on_first_rank(lambda: torch.save(rest, place / _METADATA_FILENAME))
    on_first_rank(lambda: files.put(place, path))


def gathered(checkpoint: Tree, names: Names, replica: int) -> Tree:
    """The checkpoint of all ranks on global rank 0, and some part of it on other ranks. Collective; arguments as of
    `save_directory`."""
    tensors, rest = _apart(checkpoint, names)
    rest = _joined(rest, names, replica)
    own = {path: _on_cpu(value) for path, value in _leaves(tensors)}
    everyone = from_everyone(set(own) if replica == 0 else set())
    before = set().union(*everyone[: dist.get_rank()]) if dist.is_initialized() else set()
    own = {path: value for path, value in own.items() if replica == 0 and path not in before}
    parts: list[Any] = [own]
    if dist.is_initialized():
        parts = [{}] * dist.get_world_size()
        dist.gather_object(own, parts if dist.get_rank() == 0 else None)
    tensors = nested({path: value for part in parts for path, value in part.items()})
    weights = tensors.get(MODEL, {})
    for copy, original in names.copies.items():
        if copy in weights and original in weights:
            weights[copy] = weights[original]  # so that the file has one tensor for both, as in one process
    return complete(rest, tensors)


def load_directory(
    path: Path, names: Names, own: Mapping[str, Any], optimizers: bool, unknown: bool, weights_only: bool | None
) -> Tree:
    """This rank's part of a checkpoint directory. Collective.

    Args:
        own: this rank's `state_dict`, into whose tensors weights are read; empty: weights are read into new tensors. Of
            a weight that lies in shards or slices, only this rank's part of the optimizer state is read.
        optimizers: whether to read the optimizers' states.
        unknown: whether to read weights that the model does not have; otherwise they become tensors without values.

    Raises:
        ValueError: `path` is not a checkpoint directory; raised on all ranks.
    """
    missing = [] if (path / ".metadata").is_file() else [str(path / ".metadata")]
    agree(missing, f"{path} is not a checkpoint directory, no such file")
    metadata = FileSystemReader(path).read_metadata()
    places: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
    known = set(places.values())
    wanted = {MODEL, *([OTHERS] if optimizers or unknown else [])}
    room: dict[tuple[Any, ...], Any] = {}
    unread: Tree = {}
    for key, place in places.items():
        kind, name, entry = place[0], place[-1], metadata.state_dict_metadata[key]
        if not (kind in wanted or (optimizers and kind.startswith("optimizer_"))) or not _is_kept(place, known, names):
            continue
        if kind == MODEL and not unknown and names.of_model(name) != name:
            unread[name] = _empty(entry, "meta")
        else:
            room[place] = _room(entry, own.get(name)) if kind == MODEL else _moments(entry, place, own)
    tree = nested(room)
    with single_process_dcp():
        dcp_load(tree, checkpoint_id=path, no_dist=not dist.is_initialized())
    rest = names.select(torch.load(path / _METADATA_FILENAME, map_location="cpu", weights_only=weights_only))
    return complete(rest, {**tree, MODEL: {**tree.get(MODEL, {}), **unread}})


def load_weights(
    module: PipelineModule, state: Mapping[str, Any], names: Names, strict: bool, path: Path | str
) -> None:
    """Load the weights of a checkpoint, as hooks have left them, into the module. Collective.

    Raises:
        ValueError: names or shapes do not fit; the message lists them. Raised on all ranks.
    """
    state = {name: value for name, value in state.items() if names.selects(name, state.__contains__)}
    for copy, original in names.copies.items():
        if copy in names.own and copy not in state and original in state:
            state[copy] = state[original] if original in names.own else state.pop(original)
    wanted = module.state_dict()
    stored, model = (
        {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in named.items()}
        for named in (state, wanted)
    )
    agree(
        mismatches(stored, model, strict),
        f"cannot load {path}: tensors that do not fit, so this is another model's checkpoint",
    )
    fitting = {name: value for name, value in state.items() if name in wanted}
    module.load_state_dict({name: shard_like(value, wanted[name]) for name, value in fitting.items()}, strict=False)


def agree(problems: Sequence[str], what: str) -> None:
    """Raise a ValueError on all ranks if any rank found a problem, so that no rank waits for another. Collective."""
    found = sorted({problem for part in from_everyone(list(problems)) for problem in part})
    if found:
        raise ValueError(f"{what}: {first_few(found)}")


def from_everyone(own: Any) -> list[Any]:
    """The values of all ranks, by rank. Collective."""
    if not dist.is_initialized():
        return [own]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def on_first_rank(function: Callable[[], Any]) -> Any:
    """Call a function, which works on files, on global rank 0. Collective.

    Returns: its result, on all ranks.

    Raises:
        Exception: what the function raised, on rank 0; a RuntimeError that quotes it on the others.
    """
    first, done, failed = not dist.is_initialized() or dist.get_rank() == 0, None, None
    if first:
        try:
            done = function()
        except Exception as error:
            failed = error
    answer: list[Any] = [done, failed and f"{type(failed).__name__}: {failed}"]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if failed is not None:
        raise failed
    if answer[1] is not None:
        raise RuntimeError(f"rank 0 could not write a checkpoint: {answer[1]}")
    return answer[0]


def _apart(checkpoint: Tree, names: Names) -> tuple[Tree, Tree]:
    """The tensors that are keyed by names of the model, under their keys in DCP; and everything else."""
    checkpoint = dict(checkpoint)
    tensors: Tree = {MODEL: checkpoint.pop("state_dict", {})}
    states = [split(state, names) for state in checkpoint.pop("optimizer_states", [])]
    tensors.update({f"optimizer_{i}": some for i, (some, _) in enumerate(states)})
    tensors[OTHERS], rest = split(checkpoint, names)
    if states:
        rest["optimizer_states"] = [others for _, others in states]
    return tensors, rest


def _joined(rest: Tree, names: Names, replica: int) -> Tree:
    """Everything that is not a tensor of the model, joined over the ranks of the first replica. Collective."""
    parts = [part for part in from_everyone(rest if replica == 0 else None) if part is not None]
    return joined(parts, names)


def _is_kept(place: tuple[Any, ...], known: Collection[tuple[Any, ...]], names: Names) -> bool:
    """Whether this rank gets the value at a place of the tree."""

    def beside(i: int) -> Callable[[str], bool]:
        return lambda key: (*place[:i], key, *place[i + 1 :]) in known

    return all(names.selects(key, beside(i)) for i, key in enumerate(place))


def _leaves(tree: Tree, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    found: list[tuple[tuple[Any, ...], Any]] = []
    for key, value in tree.items():
        found += _leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return found


def _on_cpu(value: Any) -> Any:
    """A whole tensor on the CPU. Collective over the ranks that have shards of it."""
    return whole_of(value).cpu() if isinstance(value, Tensor) else value


def _room(entry: Any, own: Any) -> Any:
    """A tensor to read into: the model's own if its shape and type are the same, or a new one."""
    alike = isinstance(own, Tensor) and isinstance(entry, TensorStorageMetadata) and own.shape == entry.size
    alike = alike and not is_packed(own)  # `load_weights` cuts these
    return own if alike and own.dtype == entry.properties.dtype else _empty(entry, "cpu")


def _moments(entry: Any, place: tuple[Any, ...], own: Mapping[str, Any]) -> Any:
    """A new tensor to read an entry of an optimizer's state into, divided as its weight is."""
    weight = own.get(place[2]) if place[0] != OTHERS and len(place) == 4 else None
    if not isinstance(weight, DTensor) or is_packed(weight):  # it is read whole, and cut when the optimizer gets it
        return _empty(entry, "cpu")
    alike = isinstance(entry, TensorStorageMetadata) and weight.shape == entry.size
    return torch.empty_like(weight, dtype=entry.properties.dtype) if alike else _empty(entry, "cpu")


def _empty(entry: Any, device: str) -> Any:
    is_tensor = isinstance(entry, TensorStorageMetadata)
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device) if is_tensor else None
