"""The weights in a checkpoint of any strategy: their shapes at once, their values only where they are asked for.

A checkpoint is a directory in torch's DCP format, which has the model under the key "model", or a file, which is mapped
into memory and read page by page.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.tensor import DTensor, distribute_tensor

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.mismatches import Shape, mismatches
from bigmac_lightning.checkpoints.packed import is_packed
from bigmac_lightning.checkpoints.reading import as_checkpoint, check_directory, single_process_dcp


class CheckpointWeights:
    """The weights in a checkpoint.

    Attributes:
        path: the directory or the file.
        shapes: the shape of each tensor, by its name in the whole model.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: what is there is not a checkpoint.
        """
        self.path = files.present(Path(path))
        self._file: dict[str, Any] | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        if self.path.is_dir():
            check_directory(self.path)
            metadata = FileSystemReader(self.path).read_metadata().state_dict_metadata
            entries = {
                name.removeprefix("model."): entry
                for name, entry in metadata.items()
                if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
            }
            self.shapes: dict[str, Shape] = {name: tuple(entry.size) for name, entry in entries.items()}
            self._dtypes = {name: entry.properties.dtype for name, entry in entries.items()}
        else:
            file = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            self._file = as_checkpoint(file, str(self.path))
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._file["state_dict"].items()}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values into these tensors, by name. The tensors may have any dtype and device. Of a tensor that lies
        in slices, this process gets its slice."""
        if self._file is not None:
            for name, tensor in tensors.items():
                _copy(self._file["state_dict"][name], tensor)
            return
        with single_process_dcp():
            direct = {name: tensor for name, tensor in tensors.items() if not is_packed(tensor)}
            dcp_load({"model": direct}, checkpoint_id=self.path, no_dist=True)
            for name in tensors.keys() - direct.keys():
                whole = torch.empty(self.shapes[name], dtype=self._dtypes[name], device="cpu")
                dcp_load({"model": {name: whole}}, checkpoint_id=self.path, no_dist=True)
                _copy(whole, tensors[name])

    def read(self) -> dict[str, Tensor]:
        """All tensors, by name."""
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
        """Why a model, or a component of it, cannot take its weights from here; the list is empty if it can.

        Args:
            shapes: the shapes of all tensors of the model, by name.
            component: the component to look at, such as "encoders.image"; "": the whole model.
            allowed: names that the checkpoint may have without the model having them.
        """
        inside = f"{component}." if component else ""
        stored, wanted = (
            {name: shape for name, shape in named.items() if name.startswith(inside)} for named in (self.shapes, shapes)
        )
        return mismatches(stored, wanted, allowed=allowed)


def _copy(whole: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, or this process's slice of it."""
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(
                whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.copy_(whole)
