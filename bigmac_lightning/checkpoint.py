"""Checkpoints that any number of ranks can read: tensors by their name in the whole model, in torch's DCP format.

The model lies under the key "model", optimizer states under "optimizer_0", ..., everything else in Lightning's
metadata file beside them. A tied output weight is stored once, under the embedding's name.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from bigmac_lightning.module import PipelineModule
from bigmac_lightning.runtime.mesh import PipelineMesh


def model_state(module: PipelineModule) -> dict[str, Any]:
    """This rank's tensors by their canonical names."""
    copies = _tied_names(module)
    state = module.state_dict()
    return {copies.get(name, name): tensor for name, tensor in state.items()}


def with_tied_copies(module: PipelineModule, state: dict[str, Any]) -> dict[str, Any]:
    """A whole model's state as its `load_state_dict` wants it: tied weights under both names."""
    copies = {copy: state[canonical] for copy, canonical in _tied_names(module).items() if canonical in state}
    return {**state, **copies}


def optimizer_state(module: PipelineModule, optimizer: Optimizer) -> dict[str, Any]:
    """This rank's optimizer state, flat: ``state.<parameter>.exp_avg``, ``param_groups.<parameter>.lr``, ...

    A parameter that never had a gradient has no state entries, as in the optimizer itself.
    """
    optimizer = _bare(optimizer)
    flat: dict[str, Any] = {}
    for group, parameter, name in _parameters(module, optimizer):
        flat.update({f"state.{name}.{entry}": value for entry, value in optimizer.state.get(parameter, {}).items()})
        flat.update({f"param_groups.{name}.{key}": value for key, value in group.items() if key != "params"})
    return flat


def gather(state: dict[str, Any], mesh: PipelineMesh) -> dict[str, Any]:
    """The state of all ranks of the first replica, on global rank 0; empty elsewhere."""
    own = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
    parts: list[dict[str, Any]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own if mesh.dp_rank == 0 else {}, parts)
    return {name: value for part in parts or [] for name, value in part.items()}


def save(checkpoint: dict[str, Any], path: Path, is_global_zero: bool) -> None:
    """Write a checkpoint directory. Collective.

    Everything is written beside `path` first and moved there when complete: an interrupted save leaves the old one.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    if is_global_zero:
        remove(unfinished)
    dist.barrier()
    state = {"model": checkpoint.pop("state_dict")}
    state.update({f"optimizer_{i}": s for i, s in enumerate(checkpoint.pop("optimizer_states", []))})
    dcp_save(state, checkpoint_id=unfinished)
    if is_global_zero:
        torch.save(checkpoint, unfinished / _METADATA_FILENAME)
        remove(path)
        unfinished.rename(path)
    dist.barrier()


def load(
    path: Path,
    module: PipelineModule,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    weights_only: bool | None,
) -> dict[str, Any]:
    """Load this rank's part of a checkpoint into module and optimizers. Collective.

    Returns: the rest of the checkpoint (loops, callbacks, schedulers, ...).

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the checkpoint is another model's; names and shapes that do not fit are listed. On all ranks.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.is_dir():
        return _load_directory(path, module, optimizers, weights_only)
    checkpoint: dict[str, Any] = _load(path, map_location="cpu", weights_only=weights_only)
    _load_tensors(path, module, checkpoint.pop("state_dict", {}))
    states = checkpoint.pop("optimizer_states", [])
    for optimizer, state in zip(optimizers, states, strict=False):
        if "param_groups" in state and isinstance(state["param_groups"], list):
            raise ValueError(
                f"{path} was saved by another strategy: its optimizer state cannot be resumed under strategy='bigmac'. "
                "Start from its weights instead (load_state_dict before fit, or a checkpoint with save_weights_only)."
            )
        _set_optimizer(module, optimizer, state)
    return checkpoint


def remove(path: Path) -> None:
    """Delete a checkpoint file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _load_directory(
    path: Path, module: PipelineModule, optimizers: Sequence[Optimizer], weights_only: bool | None
) -> dict[str, Any]:
    if not (path / ".metadata").is_file():
        _agree(path, [str(path / ".metadata")], "not a checkpoint directory, no such file")
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    wanted = model_state(module)
    shapes = {name.removeprefix("model."): getattr(entry, "size", None) for name, entry in stored.items()}
    sizes = {name: tuple(size) for name, size in shapes.items() if size is not None and f"model.{name}" in stored}
    _check_model(path, wanted, sizes, _tied_names(module))
    dcp_load({"model": wanted}, checkpoint_id=path)  # in place
    for i, optimizer in enumerate(optimizers):
        state = _room_for(f"optimizer_{i}.", stored, {name for *_, name in _parameters(module, _bare(optimizer))})
        if state:  # else saved with save_weights_only
            dcp_load({f"optimizer_{i}": state}, checkpoint_id=path)
            _set_optimizer(module, optimizer, state)
    return torch.load(path / _METADATA_FILENAME, map_location="cpu", weights_only=bool(weights_only))


def _load_tensors(path: Path, module: PipelineModule, stored: Mapping[str, Tensor]) -> None:
    wanted = model_state(module)
    _check_model(path, wanted, {name: tuple(tensor.shape) for name, tensor in stored.items()}, _tied_names(module))
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])


def _check_model(
    path: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]], allowed: Collection[str]
) -> None:
    """Names and shapes must be the model's; `allowed` names may be stored without being in the model's state."""
    wrong = [f"{name}: missing" for name in wanted if name not in stored]
    wrong += [
        f"{name}: {stored[name]} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in stored and stored[name] != tuple(tensor.shape)
    ]
    names: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, set(wanted))
    wrong += [f"{name}: not in the model" for name in sorted(set(stored) - set().union(*names) - set(allowed))]
    _agree(path, wrong, "tensors that do not fit, so this is another model's checkpoint")


def _agree(path: Path, problems: list[str], what: str) -> None:
    """Raise on all ranks if any rank found a problem, so that none waits for another."""
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, problems)
    found = sorted({problem for part in everywhere for problem in part})
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(f"cannot load {path}: {what}: {'; '.join(found[:5])}{more}")


def _room_for(prefix: str, stored: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What is stored of these parameters' optimizer state, as empty tensors (and None for what is no tensor)."""
    room: dict[str, Any] = {}
    for key, entry in stored.items():
        kind, _, rest = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or rest.rpartition(".")[0] not in names:
            continue
        is_tensor = isinstance(entry, TensorStorageMetadata)
        room[f"{kind}.{rest}"] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None
    return room


def _set_optimizer(module: PipelineModule, optimizer: Optimizer, flat: Mapping[str, Any]) -> None:
    """Give the optimizer its state: moments on their parameter's device, step counters where they were."""
    optimizer = _bare(optimizer)
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        name, _, entry = key.rpartition(".")
        by_name.setdefault(name, {})[entry] = value
    optimizer.state.clear()
    for group, parameter, name in _parameters(module, optimizer):
        group.update(by_name.get(f"param_groups.{name}", {}))
        state = by_name.get(f"state.{name}")
        if state is not None:
            optimizer.state[parameter] = {
                entry: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
                for entry, value in state.items()
            }


def _parameters(module: PipelineModule, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, str]]:
    """(group, parameter, canonical name) of everything the optimizer steps."""
    copies = _tied_names(module)
    names = {parameter: copies.get(name, name) for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter, names[parameter]


def _bare(optimizer: Optimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _tied_names(module: PipelineModule) -> dict[str, str]:
    """Full names of tied copies and of the embeddings they are tied to."""
    return {f"llm.{copy}": f"llm.{canonical}" for copy, canonical in module.llm.tied.items()}
