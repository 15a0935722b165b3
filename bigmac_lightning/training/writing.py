"""Writes a checkpoint of which each rank has a part: a directory into which all ranks write, or one file of rank 0.

First each rank takes from Lightning's checkpoint what belongs to it. This uses the process groups of training. The rest
is work on files and messages on the CPU, which may also be done in a thread, over a process group of its own.
"""

import pickle
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.agreement import from_everyone, on_first_rank, place_of, results_of, together
from bigmac_lightning.checkpoints.marker import MARKER, Part, part_of, problems_of_files, write_marker, write_parts
from bigmac_lightning.checkpoints.mismatches import first_few
from bigmac_lightning.checkpoints.packed import in_one_piece
from bigmac_lightning.checkpoints.parts import MODEL, OTHERS, Names, Tree, complete, joined, nested, split
from bigmac_lightning.checkpoints.remote import Place, RemotePath
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


def save_directory(contents: Contents, path: Place, group: Any = None, repeating: Repeating | None = None) -> None:
    """Write a checkpoint directory. Collective.

    Everything is written beside `path` first, the marker last, and moved there when it is complete. If `path` is
    remote, each rank writes into a local folder of its own first, and then uploads its files. A save that is
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

    def prepare() -> Place:
        rest.append(_joined(every_rest, contents.names))
        return files.unfinished(path)

    def write_own() -> dict[str, Part]:
        parts = known.write(folder, tensors, rank) if known is not None else {}
        for whole in rest:  # on the first rank
            parts[_METADATA_FILENAME] = _write_file(folder / _METADATA_FILENAME, whole)
        others = [*folder.glob(f"__{rank}_*"), *([folder / DCP_METADATA] if rank == 0 else [])]
        parts = {file.name: part_of(file) for file in others if file.name not in parts} | parts
        upload(parts)
        return parts

    def upload(names: Iterable[str]) -> None:
        if isinstance(place, RemotePath):
            for name in names:
                (place / name).upload(folder / name)

    place: Place = on_first_rank(prepare, what, group)
    staged = ExitStack()
    try:
        folder = place if isinstance(place, Path) else together(lambda: _staging(staged), what, group)
        if known is None:
            _write_tensors(nested(tensors), folder, what, group)
            if repeating is not None:
                if folder != place:
                    _share(folder / DCP_METADATA, what, group)
                repeating.remember(folder, tensors, rank)
        written = results_of(write_own, what, group)
        every = {name: part for found in written for name, part in found.items()}

        def finish() -> None:
            if folder != place and (problems := problems_of_files(place, every)):
                raise OSError(first_few(problems))
            write_marker(folder, every, contents.step, world)
            upload([MARKER])
            files.put(place, path)

        on_first_rank(finish, what, group)
    except Exception:
        if rank == 0:
            discard(place)
        raise
    finally:
        staged.close()


def check_writable(folder: RemotePath) -> None:
    """Write something into a remote folder and delete it again, on every rank. Collective.

    Raises:
        OSError, ValueError, RuntimeError: this fails on some rank, or the ranks have different folders of this name;
            all ranks raise the same.
    """
    what = f"checkpoints cannot be saved in {folder}"
    rank, world = place_of()
    names = [f".tried-by-rank-{rank}" for rank in range(world)]

    def write() -> None:
        with TemporaryDirectory() as local:
            (Path(local) / names[rank]).write_text("Checkpoints can be written here.")
            (folder / names[rank]).upload(Path(local) / names[rank])

    def look() -> None:
        if missing := set(names) - {place.name for place in folder.iterdir()}:
            raise ValueError(f"{min(missing)} was written, and is not there: it must be one place for all processes")

    try:
        together(write, what)
        on_first_rank(look, what)
    finally:
        with suppress(Exception):  # not to be allowed to delete is no reason to stop
            (folder / names[rank]).unlink()


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


def discard(place: Place) -> None:
    """Delete what a failed save has left, so that it takes no room. If that fails, too, the next save does it."""
    with suppress(Exception):  # remote file systems raise errors of many libraries
        files.remove(place)


def _staging(staged: ExitStack) -> Path:
    """A local folder for this rank's files of a remote checkpoint, which is deleted with `staged`."""
    return Path(staged.enter_context(TemporaryDirectory(prefix="bigmac-", ignore_cleanup_errors=True)))


def _share(file: Path, what: str, group: Any) -> None:
    """Give all ranks a copy of a file that the first rank has written into its own folder. Collective."""
    content = on_first_rank(file.read_bytes, what, group)
    together(lambda: file.write_bytes(content), what, group)


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
