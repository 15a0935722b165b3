"""The weights in a checkpoint of any strategy: their shapes at once, their values only where they are asked for.

A checkpoint is a directory in torch's DCP format, which has the model under the key "model", or a file, which is mapped
into memory and read page by page.
"""

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.checkpoints.agreement import agree, place_of
from bigmac_lightning.checkpoints.mismatches import Shape, mismatches
from bigmac_lightning.checkpoints.reading import NOT_WHOLE, as_checkpoint, check_directory, refuse
from bigmac_lightning.checkpoints.remote import Place, at
from bigmac_lightning.checkpoints.safe import Reader, load_file, read_into


class CheckpointWeights:
    """The weights in a checkpoint.

    Attributes:
        path: the directory or the file.
        shapes: the shape of each tensor, by its name in the whole model.
    """

    def __init__(self, path: str | Place) -> None:
        """
        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: what is there is not a checkpoint, files of it are missing or cut off, or it holds what could
                run code.
        """
        self.path = files.present(at(path))
        if self.path.is_dir():
            check_directory(self.path)
        refuse(marker.problems(self.path, contents=False), self.path)
        self._file: dict[str, Any] | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        if self.path.is_dir():
            metadata = Reader(self.path).read_metadata().state_dict_metadata
            entries = {
                name.removeprefix("model."): entry
                for name, entry in metadata.items()
                if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
            }
            self.shapes: dict[str, Shape] = {name: tuple(entry.size) for name, entry in entries.items()}
            self._dtypes = {name: entry.properties.dtype for name, entry in entries.items()}
        else:
            mapped = isinstance(self.path, Path) and zipfile.is_zipfile(self.path)
            file = load_file(self.path, self.path, mmap=mapped)
            self._file = as_checkpoint(file, str(self.path))
            self.shapes = {name: tuple(tensor.shape) for name, tensor in self._file["state_dict"].items()}

    def check(self) -> None:
        """Compare the checksums of all files. Collective if torch.distributed is initialized: each process reads a
        share of the files.

        Raises:
            ValueError: a file is damaged; raised on all ranks.
        """
        agree(marker.problems(self.path, share=place_of()), NOT_WHOLE.format(self.path))

    def check_ties(self, copies: Mapping[str, str]) -> None:
        """
        Args:
            copies: for each tied weight of a model, the name of the weight that it is a copy of.

        Raises:
            ValueError: here, these are two different tensors, so a model that ties them cannot have both.
        """
        for copy, original in copies.items():
            if copy in self.shapes and original in self.shapes:
                pair = self.read([copy, original])
                check_tied(pair, copies, self.path)

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values into these tensors, by name. The tensors may have any dtype and device. Of a tensor that lies
        in slices or shards, this process gets its part."""
        if self._file is not None:
            for name, tensor in tensors.items():
                copy_into(self._file["state_dict"][name], tensor)
            return
        read_into({"model": dict(tensors)}, self.path)

    def read(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Tensors of these names, by default all."""
        names = self.shapes if names is None else names
        if self._file is not None:
            return {name: self._file["state_dict"][name] for name in names}  # as saved: tied ones share their memory
        tensors = {name: torch.empty(self.shapes[name], dtype=self._dtypes[name]) for name in names}
        self.read_into(tensors)
        return tensors

    def rest(self) -> dict[str, Any]:
        """What the checkpoint holds besides weights and optimizer states."""
        if self._file is None:
            return load_file(self.path / _METADATA_FILENAME, self.path / _METADATA_FILENAME)
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


def check_tied(state: Mapping[str, Any], copies: Mapping[str, str], path: Place | str) -> None:
    """
    Args:
        state: whole tensors by name.
        copies: for each tied weight of a model, the name of the weight that it is a copy of.

    Raises:
        ValueError: a tied weight and its original are both in `state`, and differ.
    """
    for copy, original in copies.items():
        one, other = state.get(copy), state.get(original)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and not torch.equal(one, other):
            raise ValueError(UNTIED.format(path, copy, original))


UNTIED = (
    "{} has {} and {} as two different weights, but this model ties them to one (tie_word_embeddings): train a model "
    "that does not tie them"
)


def copy_into(whole: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into one of any dtype and device, or this process's slice of it into its slice."""
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(
                whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.copy_(whole)
