"""Writes a checkpoint of which each rank has a part: a directory into which all ranks write, or one file of rank 0.

First each rank takes from Lightning's checkpoint what belongs to it. This uses the process groups of training. The rest
is work on files and messages on the CPU, which may also be done in a thread, over a process group of its own.
"""

import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.agreement import from_everyone, on_first_rank, place_of, results_of
from bigmac_lightning.checkpoints.marker import Part, part_of, write_marker, write_parts
from bigmac_lightning.checkpoints.packed import in_one_piece
from bigmac_lightning.checkpoints.parts import MODEL, OTHERS, Names, Tree, complete, joined, nested, split
from bigmac_lightning.checkpoints.safe import DCP_METADATA, reasons_of, without_group
from bigmac_lightning.runtime.sharding import whole_of
from bigmac_lightning.training.copying import Copies, Leaves
from bigmac_lightning.training.repeating import Repeating


@dataclass(frozen=True)
class Contents:
    """What this rank has of a checkpoint.

    Attributes:
        tensors: the tensors that go by names of the model, by their paths in DCP.
        rest: everything else, as a pickle, which training does not change and which other ranks can be sent.
        names: the names of the whole model's tensors.
        replica: the data-parallel replica that this rank belongs to; what the first replica has is saved, and `rest` is
            empty on others.
        step: the optimizer steps that the run has made.
    """

    tensors: Leaves
    rest: bytes
    names: Names
    replica: int
    step: int

    @classmethod
    def of(cls, checkpoint: Tree, names: Names, replica: int, whole: bool) -> "Contents":
        """Collective.

        Args:
            checkpoint: this rank's part, as Lightning makes it.
            whole: whether to join tensors that lie in shards or slices.
        """
        tensors, rest = _apart(checkpoint, names)
        take = _whole_on_cpu if whole else in_one_piece
        step = int(checkpoint.get("global_step", 0))
        leaves = {path: take(value) for path, value in _leaves(tensors)}
        return cls(leaves, pickle.dumps(rest) if replica == 0 else b"", names, replica, step)

    def copied(self, copies: Copies) -> "Contents":
        """A copy on the CPU, which training does not change."""
        return replace(self, tensors=copies.of(self.tensors))


def save_directory(contents: Contents, path: Path, group: Any = None, repeating: Repeating | None = None) -> None:
    """Write a checkpoint directory. Collective.

    Everything is written beside `path` first, the marker last, and moved there when it is complete. A save that is
    interrupted or fails leaves the old checkpoint as it was.

    Args:
        group: the process group to use; ``None``: the default one.
        repeating: how the last directory of this run was written, and from now on this one.

    Raises:
        OSError, ValueError, TypeError, RuntimeError: it cannot be written; all ranks raise the same, which names the
            path and the reason.
    """
    what = f"cannot save the checkpoint {path}"
    rank, world = place_of(group)
    tensors = contents.tensors
    own_fit = repeating is not None and repeating.fits(tensors)
    fits, every_rest = zip(*from_everyone((own_fit, contents.rest), group), strict=True)
    known = repeating if all(fits) else None
    rest: list[Any] = []

    def prepare() -> Path:
        rest.append(_joined(every_rest, contents.names))
        return files.unfinished(path)

    def write_own() -> dict[str, Part]:
        parts = known.write(place, tensors, rank) if known is not None else {}
        for whole in rest:  # on the first rank
            parts[_METADATA_FILENAME] = _write_file(place / _METADATA_FILENAME, whole)
        others = [*place.glob(f"__{rank}_*"), *([place / DCP_METADATA] if rank == 0 else [])]
        return {file.name: part_of(file) for file in others if file.name not in parts} | parts

    place = on_first_rank(prepare, what, group)
    try:
        if known is None:
            _write_tensors(nested(tensors), place, what, group)
            if repeating is not None:
                repeating.remember(place, tensors, rank)
        written = results_of(write_own, what, group)
        every = {name: part for found in written for name, part in found.items()}

        def finish() -> None:
            write_marker(place, every, contents.step, world)
            files.put(place, path)

        on_first_rank(finish, what, group)
    except Exception:
        if rank == 0:
            discard(place)
        raise


def save_file(contents: Contents, path: str, write: Callable[[Tree], None], group: Any = None) -> None:
    """Let global rank 0 write one file. Collective.

    Args:
        contents: with whole tensors.
        write: writes a checkpoint to `path`.
        group: see `save_directory`; it raises the same errors.
    """
    whole = gathered(contents, group)
    on_first_rank(lambda: write(whole), f"cannot save the checkpoint {path}", group)


def gathered(contents: Contents, group: Any = None) -> Tree:
    """The checkpoint of all ranks on global rank 0, and some part of it on other ranks. Collective."""
    names, rest = contents.names, _joined_rest(contents, group)
    own = contents.tensors if contents.replica == 0 else {}
    everyone = from_everyone(set(own), group)
    rank, world = place_of(group)
    before = set[Any]().union(*everyone[:rank])
    own = {path: value for path, value in own.items() if path not in before}
    parts: list[Any] = [own]
    if dist.is_initialized():
        parts = [{}] * world
        dist.gather_object(own, parts if rank == 0 else None, group=group)
    tensors = nested({path: value for part in parts for path, value in part.items()})
    weights = tensors.get(MODEL, {})
    for copy, original in names.copies.items():
        if copy in weights and original in weights:
            weights[copy] = weights[original]  # so that the file has one tensor for both, as in one process
    return complete(rest, tensors)


def discard(place: Path) -> None:
    """Delete what a failed save has left, so that it takes no room. If that fails, too, the next save does it."""
    with suppress(OSError):
        files.remove(place)


def _write_tensors(tensors: Tree, place: Path, what: str, group: Any) -> None:
    try:
        if dist.is_initialized():
            dcp_save(tensors, checkpoint_id=place, process_group=group)
        else:
            with without_group():
                dcp_save(tensors, checkpoint_id=place, no_dist=True)
    except CheckpointException as failure:
        errors = [error for error, _ in failure.failures.values()]
        kind = OSError if all(isinstance(error, OSError) for error in errors) else RuntimeError
        raise kind(f"{what}: {reasons_of(failure)}") from failure


def _write_file(path: Path, contents: Any) -> Part:
    saved = BytesIO()
    torch.save(contents, saved)
    return write_parts(path, [saved.getbuffer()])


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


def _joined_rest(contents: Contents, group: Any) -> Tree:
    """Everything that is not a tensor of the model, joined over the ranks of the first replica. Collective."""
    return _joined(from_everyone(contents.rest, group), contents.names)


def _joined(parts: Sequence[bytes], names: Names) -> Tree:
    return joined([pickle.loads(part) for part in parts if part], names)


def _leaves(tree: Tree, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    found: list[tuple[tuple[Any, ...], Any]] = []
    for key, value in tree.items():
        found += _leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return found


def _whole_on_cpu(value: Any) -> Any:
    """A whole tensor on the CPU. Collective over the ranks that have shards of it."""
    return whole_of(value).cpu() if isinstance(value, Tensor) else value
