"""Checkpoints of any strategy, read in one process alone: their weights by names and shapes, or all that is in them.

Of a directory (torch's DCP format, the model under the key "model") only the weights that are asked for are read; of a
file, they are paged in. Knows nothing of modules or ranks.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.parts import MODEL, complete

Shape = tuple[int, ...]


class StoredWeights:
    """A model's weights in a checkpoint.

    Attributes:
        path: of the checkpoint, a directory or a file.
        shapes: of its tensors, by their names in the whole model.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: it is no checkpoint.
        """
        self.path = files.present(Path(path))
        self._file: dict[str, Any] | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        if self.path.is_dir():
            _check_directory(self.path)
            stored = FileSystemReader(self.path).read_metadata().state_dict_metadata
            entries = {
                name.removeprefix("model."): entry
                for name, entry in stored.items()
                if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
            }
            self.shapes: dict[str, Shape] = {name: tuple(entry.size) for name, entry in entries.items()}
            self._dtypes = {name: entry.properties.dtype for name, entry in entries.items()}
        else:
            file = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            self._file = as_checkpoint(file, str(self.path))
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._file["state_dict"].items()}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill these tensors, by name and in place, whatever their dtype and device are."""
        if self._file is not None:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(self._file["state_dict"][name])
            return
        with alone():
            dcp_load({"model": dict(tensors)}, checkpoint_id=self.path, no_dist=True)

    def read(self) -> dict[str, Tensor]:
        """All tensors."""
        if self._file is not None:
            return self._file["state_dict"]  # as saved: tied ones share their memory
        tensors = {name: torch.empty(shape, dtype=self._dtypes[name]) for name, shape in self.shapes.items()}
        self.read_into(tensors)
        return tensors

    def rest(self) -> dict[str, Any]:
        """What the checkpoint holds besides weights and optimizer states."""
        if self._file is None:
            return torch.load(self.path / _METADATA_FILENAME, map_location="cpu", weights_only=True)
        return {key: value for key, value in self._file.items() if key != "state_dict"}

    def mismatches(self, shapes: Mapping[str, Shape], component: str = "", allowed: Collection[str] = ()) -> list[str]:
        """What keeps a model, or a component of it, from taking its weights from here; empty if nothing does.

        Args:
            shapes: of all of the model's tensors, by name.
            component: the beginning of the names to look at, such as "encoders.image"; "": all.
            allowed: names that may be stored without being the model's.
        """
        inside = f"{component}." if component else ""
        wanted = {name: shape for name, shape in shapes.items() if name.startswith(inside)}
        stored = {name: shape for name, shape in self.shapes.items() if name.startswith(inside)}
        found = [f"{name}: missing" for name in wanted if name not in stored]
        found += [
            f"{name}: {stored[name]} in the checkpoint, {shape} in the model"
            for name, shape in wanted.items()
            if name in stored and stored[name] != shape
        ]
        return found + [f"{name}: not in the model" for name in sorted(stored.keys() - wanted.keys() - set(allowed))]


class DirectoryCheckpointIO(TorchCheckpointIO):
    """Lets a strategy that writes files read directories, too, and what `consolidate_checkpoint` has made of them."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if files.is_directory(path):
            return read_directory(files.present(Path(path)))
        return as_checkpoint(super().load_checkpoint(path, *args, **kwargs), str(path))


@contextmanager
def alone() -> Iterator[None]:
    """Without DCP's warnings about a process that reads or writes alone, as it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # disabled, unavailable, ...
        yield


def read_directory(path: Path) -> dict[str, Any]:
    """All of a checkpoint directory, as Lightning would have saved it in one process, but optimizer states by name.

    Raises:
        ValueError: it is no checkpoint.
    """
    _check_directory(path)
    with alone():
        return as_checkpoint(_load_distributed_checkpoint(path), str(path))


def as_checkpoint(contents: Any, path: str) -> dict[str, Any]:
    """A checkpoint from what is in a file, which may be one that Lightning's `consolidate_checkpoint` has made.

    Raises:
        ValueError: it is no checkpoint.
    """
    if isinstance(contents, dict) and "state_dict" in contents:
        return contents
    if isinstance(contents, dict) and isinstance(contents.get(MODEL), dict) and "loops" in contents:
        return complete(contents, contents)
    raise ValueError(f"{path} is no checkpoint: it has no state_dict")


def _check_directory(path: Path) -> None:
    if not (path / ".metadata").is_file():
        raise ValueError(f"{path} is not a checkpoint directory: no such file {path / '.metadata'}")
