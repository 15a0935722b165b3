"""Checkpoints that any number of ranks can read: tensors by their name in the whole model, in torch's DCP format.

The model lies under the key "model", optimizer states under "optimizer_0", ..., everything else in Lightning's
metadata file beside them. A tied output weight is stored once, under the embedding's name.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.cloud_io import _load
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from bigmac_lightning.module import PipelineModule
from bigmac_lightning.runtime.mesh import PipelineMesh

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def model_state(module: PipelineModule) -> dict[str, Any]:
    """This rank's tensors by their canonical names."""
    copies = _tied_names(module)
    state = module.state_dict()
    return {copies.get(name, name): tensor for name, tensor in state.items()}


def optimizer_state(module: PipelineModule, optimizer: Optimizer) -> dict[str, Any]:
    """This rank's optimizer state, flat: ``state.<parameter>.exp_avg``, ``param_groups.<parameter>.lr``, ..."""
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer._optimizer
    flat = get_optimizer_state_dict(module, optimizer, options=_FLAT)
    copies = _tied_names(module)
    return {_rename(key, copies): value for key, value in flat.items()}


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
    dcp.save(state, checkpoint_id=unfinished)
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
    _load_tensors(path, model_state(module), checkpoint.pop("state_dict", {}))
    states = checkpoint.pop("optimizer_states", [])
    for i, (optimizer, state) in enumerate(zip(optimizers, states, strict=False)):
        if "param_groups" in state and isinstance(state["param_groups"], list):
            raise ValueError(
                f"{path} was saved by another strategy: its optimizer state cannot be resumed under strategy='bigmac'. "
                "Start from its weights instead (load_state_dict before fit, or a checkpoint with save_weights_only)."
            )
        wanted = optimizer_state(module, optimizer)
        _agree(path, sorted(wanted.keys() - state.keys()), f"optimizer {i} entries missing in the checkpoint")
        _set_optimizer(module, optimizer, {name: state[name] for name in wanted})
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
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    wanted = model_state(module)
    shapes = {name.removeprefix("model."): getattr(entry, "size", None) for name, entry in stored.items()}
    _check_model(path, wanted, {name: tuple(size) for name, size in shapes.items() if size is not None})
    dcp.load({"model": wanted}, checkpoint_id=path)  # in place
    for i, optimizer in enumerate(optimizers):
        if not any(name.startswith(f"optimizer_{i}.") for name in stored):
            continue  # saved with save_weights_only
        state = {f"optimizer_{i}": optimizer_state(module, optimizer)}
        missing = [name for name in state[f"optimizer_{i}"] if f"optimizer_{i}.{name}" not in stored]
        _agree(path, missing, f"optimizer {i} entries missing in the checkpoint")
        dcp.load(state, checkpoint_id=path)
        _set_optimizer(module, optimizer, state[f"optimizer_{i}"])
    return torch.load(path / _METADATA_FILENAME, map_location="cpu", weights_only=bool(weights_only))


def _load_tensors(path: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    _check_model(path, wanted, {name: tuple(tensor.shape) for name, tensor in stored.items()})
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])


def _check_model(path: Path, wanted: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"{name}: missing" for name in wanted if name not in stored]
    wrong += [
        f"{name}: {stored[name]} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in stored and stored[name] != tuple(tensor.shape)
    ]
    _agree(path, wrong, "tensors that do not fit, so this is another model's checkpoint")


def _agree(path: Path, problems: list[str], what: str) -> None:
    """Raise on all ranks if any rank found a problem, so that none waits for another."""
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, problems)
    found = sorted({problem for part in everywhere for problem in part})
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(f"cannot load {path}: {what}: {'; '.join(found[:5])}{more}")


def _set_optimizer(module: PipelineModule, optimizer: Optimizer, flat: dict[str, Any]) -> None:
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer._optimizer
    originals = {canonical: copy for copy, canonical in _tied_names(module).items() if _holds(module, copy)}
    named = {_rename(key, originals): value for key, value in flat.items()}
    set_optimizer_state_dict(module, optimizer, named, options=_FLAT)


def _tied_names(module: PipelineModule) -> dict[str, str]:
    """Full names of tied copies and of the embeddings they are tied to."""
    return {f"llm.{copy}": f"llm.{canonical}" for copy, canonical in module.llm.tied.items()}


def _holds(module: PipelineModule, name: str) -> bool:
    """Whether this rank has `name` as a parameter of its own (not as a second name of the embedding)."""
    return name in dict(module.named_parameters())


def _rename(key: str, names: Mapping[str, str]) -> str:
    """`key` (``state.<name>.<entry>`` or ``param_groups.<name>.<entry>``) with the parameter's name replaced."""
    for old, new in names.items():
        for prefix in ("state", "param_groups"):
            start = f"{prefix}.{old}."
            if key.startswith(start):
                return f"{prefix}.{new}.{key.removeprefix(start)}"
    return key
