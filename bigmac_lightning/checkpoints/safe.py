"""Reads the files of checkpoints without running what may be in them.

A pickle can run any code when it is read. Here one is read only if it holds nothing but tensors and plain values, and
the metadata of torch's DCP; everything else is refused by name, unless the user trusts the checkpoint.
"""

import io
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem as filesystem
import torch.distributed.checkpoint.metadata as metadata
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.futures import Future

from bigmac_lightning.checkpoints.packed import is_packed, pieces_of
from bigmac_lightning.checkpoints.remote import Place, RemotePath

DCP_METADATA = ".metadata"
TRUST = (
    "which could run code when it is read: if you trust where the file comes from, read it with "
    "BigMacStrategy(checkpoint_weights_only=False)"
)

_OF_METADATA = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
ALLOWED: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _OF_METADATA},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{(module, kind): str for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")},
}
"""All that the metadata of DCP consist of, besides plain values and dtypes. The place where a checkpoint was written
is not needed, so any text may stand there."""


def trusting(weights_only: bool | None) -> bool:
    """Whether to read pickles of any kind. Only an explicit ``False`` says so; ``None`` does not."""
    return weights_only is False


def load_file(file: Any, path: Place | str, weights_only: bool | None = None, **options: Any) -> Any:
    """What torch.save has written, on the CPU.

    Args:
        file: the path, or an open file.
        path: the path, for errors.
        weights_only: ``False``: read a pickle of any kind.
        options: further arguments of torch.load.

    Raises:
        ValueError: the file is damaged, or holds something that could run code; the message names both.
    """
    if isinstance(file, RemotePath):
        file = io.BytesIO(file.read_bytes())
    with naming(path):
        return torch.load(file, map_location="cpu", weights_only=not trusting(weights_only), **options)


@contextmanager
def naming(path: Place | str) -> Iterator[None]:
    """Lets errors of torch.load name the file, and what is wrong with it.

    Raises:
        ValueError: the file is damaged, or holds something that could run code.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds {named_in(error)}, {TRUST}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can end in any exception
        reason = (str(error) or "its end is missing").splitlines()[0]
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {reason}") from error


class _Places(filesystem.FileSystem):
    """Files, for DCP, on a disk or in a remote file system."""

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with path.open(mode) as stream:
            yield stream


class Reader(FileSystemReader):
    """DCP's reader of a directory, which takes only classes of DCP's own from its metadata, and only files in it."""

    def __init__(self, path: Place) -> None:
        super().__init__("")
        self.fs, self.path = _Places(), path  # pyright: ignore[reportAttributeAccessIssue]
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            ValueError: the file is damaged, or holds something else.
        """
        if self._metadata is not None:
            return self._metadata
        path: Any = self.fs.concat_path(self.path, DCP_METADATA)
        with path.open("rb") as file:
            try:
                found = _MetadataUnpickler(file).load()
            except ValueError as error:
                raise ValueError(f"{path} {error}") from error
            except Exception as error:  # a damaged pickle can end in any exception
                raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise ValueError(f"{path} is damaged: it holds no metadata of a checkpoint")
        for place in found.storage_data.values():
            name = getattr(place, "relative_path", None)
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{path} names the file {name!r}, which is not in the checkpoint's folder")
        found.storage_meta = StorageMeta(load_id=self.load_id)
        self._metadata = found
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read entries in the order in which they lie in their files."""
        places = self.storage_data
        items = sorted(plan.items, key=lambda item: places[item.storage_index].offset)
        return super().read_data(replace(plan, items=items), planner)

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        if not isinstance(self.path, RemotePath):
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)  # read at once, as each jump in a remote file is a request
        return io.BytesIO(file.read(sinfo.length))


def read_into(tree: dict[str, Any], path: Place, weights_only: bool | None = None, alone: bool = True) -> None:
    """Read entries of a checkpoint directory into a nested dict of tensors, in place.

    Args:
        weights_only: ``False``: read entries that are pickles of any kind.
        alone: whether this process reads for itself; otherwise this is collective over all ranks.

    Raises:
        ValueError: an entry cannot be read; raised on all ranks that read together.
    """
    _read(tree, path, _Planner(path, weights_only), alone)


def read_all(path: Place, weights_only: bool | None = None) -> dict[str, Any]:
    """All entries of a checkpoint directory, in one process; see `read_into`."""
    tree: dict[str, Any] = {}
    _read(tree, path, _WholePlanner(path, weights_only), True)
    return tree


@contextmanager
def without_group() -> Iterator[None]:
    """Silences the warnings of DCP about a process that reads or writes without a process group: here it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # "... disabled", "... unavailable" and the like
        yield


def _read(tree: dict[str, Any], path: Place, planner: LoadPlanner, alone: bool) -> None:
    reader = Reader(path)
    reader.read_metadata()  # here, as DCP would log the traceback of an error, and then look for another file
    try:
        with without_group():
            _load_state_dict(tree, storage_reader=reader, planner=planner, no_dist=alone)
    except CheckpointException as failure:
        raise ValueError(f"cannot read the checkpoint {path}: {reasons_of(failure)}") from failure


def reasons_of(failure: CheckpointException) -> str:
    """In one line, why DCP could not read or write, without the same reason of several ranks."""
    reasons: dict[str, int] = {}
    for rank, (error, _) in sorted(failure.failures.items()):
        text = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        reasons.setdefault(text, rank)
    return "; ".join(f"rank {rank}: {text}" if rank else text for text, rank in reasons.items())


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = ALLOWED.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise ValueError(f"holds {module}.{name}, which is not part of the metadata of a checkpoint")
        return _joined_path if found is str else found


def _joined_path(*parts: str) -> str:
    return "/".join(str(part) for part in parts)


class _SafeBytes(DefaultLoadPlanner):
    """Entries that are not tensors are pickles, which DCP would read whatever they are."""

    def __init__(self, folder: Place, weights_only: bool | None, **options: Any) -> None:
        super().__init__(**options)
        self._folder, self._weights_only = folder, weights_only

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded = load_file(value, f"{self._folder} ({name})", self._weights_only)
        set_element(self.original_state_dict, self.mappings[name], loaded)


class _Planner(_SafeBytes):
    """DCP's planner for reading into given tensors. Of a slice of several pieces, each piece is read by itself."""

    def create_local_plan(self) -> LoadPlan:
        plan, metadata = super().create_local_plan(), self.metadata
        assert metadata is not None
        packed = {name: value for name, value in self.state_dict.items() if is_packed(value)}
        items = [item for item in plan.items if item.dest_index.fqn not in packed]
        for name, value in packed.items():
            chunks = [ChunkStorageMetadata(offsets, piece.size()) for offsets, piece in pieces_of(value)]
            stored: Any = metadata.state_dict_metadata[name]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return replace(plan, items=items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        if not is_packed(value):
            return super().lookup_tensor(index)
        return next(piece for offsets, piece in pieces_of(value) if offsets == index.offset)


class _WholePlanner(_SafeBytes, _EmptyStateDictLoadPlanner):
    """DCP's planner for reading everything."""


def named_in(error: Exception) -> str:
    """What an error of torch.load says that it has found."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found else "a pickle that is not of tensors and plain values"
