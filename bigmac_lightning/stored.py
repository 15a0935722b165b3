"""Weights as they lie in a checkpoint of any strategy: their names and shapes, and the values of those asked for.

Works in one process alone. Of a directory (torch's DCP format, the model under the key "model") only what is asked for
is read; of a file, what is asked for is paged in. Knows nothing of modules or ranks.
"""

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

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
        self.path = Path(path)
        self._file: dict[str, Any] | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        if not self.path.exists():
            raise FileNotFoundError(f"there is no checkpoint at {self.path}")
        if self.path.is_dir():
            if not (self.path / ".metadata").is_file():
                raise ValueError(f"{self.path} is not a checkpoint directory: no such file {self.path / '.metadata'}")
            stored = FileSystemReader(self.path).read_metadata().state_dict_metadata
            entries = {
                name.removeprefix("model."): entry
                for name, entry in stored.items()
                if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
            }
            self.shapes: dict[str, Shape] = {name: tuple(entry.size) for name, entry in entries.items()}
            self._dtypes = {name: entry.properties.dtype for name, entry in entries.items()}
        else:
            self._file = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(self._file, dict) or "state_dict" not in self._file:
                raise ValueError(f"{self.path} is no checkpoint: it has no state_dict")
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._file["state_dict"].items()}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill these tensors, by name and in place, whatever their dtype and device are."""
        if self._file is not None:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(self._file["state_dict"][name])
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # disabled, unavailable, ...: as wanted
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
