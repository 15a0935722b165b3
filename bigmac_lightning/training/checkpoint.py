"""Reads checkpoints of which each rank gets its part: a directory in torch's DCP format, or one file.

A directory has these keys in DCP: "model", the weights; "optimizer_0", ..., the moments; "others", further tensors that
are keyed by names of the model's tensors, such as a callback's moving average. Everything else is in Lightning's
metadata file. A single file is what Lightning writes in one process, except that optimizer states are keyed by
parameter names. All functions use torch.distributed's default group, and also work in one process without any.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from bigmac_lightning.checkpoints import marker
from bigmac_lightning.checkpoints.agreement import agree, from_everyone, place_of, together
from bigmac_lightning.checkpoints.mismatches import mismatches
from bigmac_lightning.checkpoints.parts import MODEL, OTHERS, Names, Tree, complete, nested
from bigmac_lightning.checkpoints.reading import NOT_WHOLE, check_directory
from bigmac_lightning.checkpoints.remote import Place
from bigmac_lightning.checkpoints.safe import Reader, load_file, read_into
from bigmac_lightning.checkpoints.weights import UNTIED
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.runtime.sharding import shard_like


def names_of(module: PipelineModule) -> Names:
    """The names of the whole model's tensors. Collective."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    own = {name for name, _ in tensors} | set(module.state_dict())
    return Names.of(own, from_everyone(own), module.tied_copies)


def load_directory(
    path: Place, names: Names, own: Mapping[str, Any], optimizers: bool, unknown: bool, weights_only: bool | None
) -> Tree:
    """This rank's part of a checkpoint directory. Collective.

    Args:
        own: this rank's `state_dict`, into whose tensors weights are read; empty: weights are read into new tensors. Of
            a weight that lies in shards or slices, only this rank's part of the optimizer state is read.
        optimizers: whether to read the optimizers' states.
        unknown: whether to read weights that the model does not have; otherwise they become tensors without values.

    Raises:
        ValueError: `path` is not a checkpoint directory, it is not whole, or it holds what could run code. Raised on
            all ranks, before any weight is read.
    """
    together(lambda: check_directory(path), "")
    agree(together(lambda: marker.problems(path, share=place_of()), ""), NOT_WHOLE.format(path))
    what, extra = f"cannot read the checkpoint {path}", path / _METADATA_FILENAME
    metadata = together(Reader(path).read_metadata, what)
    rest = together(lambda: load_file(extra, extra, weights_only), what)
    places: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
    known = set(places.values())
    wanted = {MODEL, *([OTHERS] if optimizers or unknown else [])}
    tied = {*names.copies, *names.copies.values()}  # read apart, as it is not yet known that they are equal
    inplace = {name: tensor for name, tensor in own.items() if name not in tied}
    room: dict[tuple[Any, ...], Any] = {}
    unread: Tree = {}
    for key, place in places.items():
        kind, name, entry = place[0], place[-1], metadata.state_dict_metadata[key]
        if not (kind in wanted or (optimizers and kind.startswith("optimizer_"))) or not _is_kept(place, known, names):
            continue
        if kind == MODEL and not unknown and names.of_model(name) != name:
            unread[name] = _empty(entry, "meta")
        else:
            room[place] = _room(entry, inplace.get(name)) if kind == MODEL else _moments(entry, place, own)
    tree = nested(room)
    read_into(tree, path, weights_only, alone=not dist.is_initialized())
    return complete(names.select(rest), {**tree, MODEL: {**tree.get(MODEL, {}), **unread}})


def load_weights(
    module: PipelineModule, state: Mapping[str, Any], names: Names, strict: bool, path: Place | str
) -> None:
    """Load the weights of a checkpoint, as hooks have left them, into the module. Collective.

    Raises:
        ValueError: names or shapes do not fit, or weights differ that the model ties; the message lists them. Raised
            on all ranks.
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
    values = {name: _digest(state[name]) for name in {*names.copies, *names.copies.values()} & state.keys()}
    everyone = {name: value for found in from_everyone(values) for name, value in found.items() if value is not None}
    untied = [pair for pair in names.copies.items() if len({everyone[name] for name in pair if name in everyone}) > 1]
    if untied:
        raise ValueError(UNTIED.format(path, *untied[0]))
    fitting = {name: value for name, value in state.items() if name in wanted}
    module.load_state_dict({name: shard_like(value, wanted[name]) for name, value in fitting.items()}, strict=False)


def _digest(value: Any) -> bytes | None:
    """By which ranks compare whole tensors."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.is_meta:
        return None
    return hashlib.blake2b(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).digest()


def _is_kept(place: tuple[Any, ...], known: Collection[tuple[Any, ...]], names: Names) -> bool:
    """Whether this rank gets the value at a place of the tree."""

    def beside(i: int) -> Callable[[str], bool]:
        return lambda key: (*place[:i], key, *place[i + 1 :]) in known

    return all(names.selects(key, beside(i)) for i, key in enumerate(place))


def _room(entry: Any, own: Any) -> Any:
    """A tensor to read into: the model's own if its shape and type are the same, or a new one."""
    alike = isinstance(own, Tensor) and isinstance(entry, TensorStorageMetadata) and own.shape == entry.size
    return own if alike and own.dtype == entry.properties.dtype else _divided(entry, own)


def _moments(entry: Any, place: tuple[Any, ...], own: Mapping[str, Any]) -> Any:
    """A new tensor to read an entry of an optimizer's state into, divided as its weight is."""
    weight = own.get(place[2]) if place[0] != OTHERS and len(place) == 4 else None
    return _divided(entry, weight)


def _divided(entry: Any, own: Any) -> Any:
    """A new tensor to read an entry into, of which this rank has the same part as of `own`."""
    alike = isinstance(own, DTensor) and isinstance(entry, TensorStorageMetadata) and own.shape == entry.size
    return torch.empty_like(own, dtype=entry.properties.dtype) if alike else _empty(entry, "cpu")


def _empty(entry: Any, device: str) -> Any:
    is_tensor = isinstance(entry, TensorStorageMetadata)
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device) if is_tensor else None
