"""Whole checkpoints of any strategy, read in one process: a file, or a directory in torch's DCP format."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.parts import MODEL, complete


class DirectoryCheckpointIO(TorchCheckpointIO):
    """A `CheckpointIO` for strategies that write files. It also reads directories, and the files that Lightning's
    `consolidate_checkpoint` makes of directories."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if files.is_directory(path):
            return read_directory(files.present(Path(path)))
        return as_checkpoint(super().load_checkpoint(path, *args, **kwargs), str(path))


def read_directory(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint directory, in the form that Lightning saves in one process. Only the optimizer states
    differ: they go by the names of parameters.

    Raises:
        ValueError: the path is not a checkpoint directory.
    """
    check_directory(path)
    with single_process_dcp():
        return as_checkpoint(_load_distributed_checkpoint(path), str(path))


def as_checkpoint(contents: Any, path: str) -> dict[str, Any]:
    """The checkpoint in the contents of a file, which `consolidate_checkpoint` of Lightning may have written.

    Raises:
        ValueError: the contents are not a checkpoint.
    """
    if isinstance(contents, dict) and "state_dict" in contents:
        return contents
    if isinstance(contents, dict) and isinstance(contents.get(MODEL), dict) and "loops" in contents:
        return complete(contents, contents)
    raise ValueError(f"{path} is not a checkpoint: it has no state_dict")


def check_directory(path: Path) -> None:
    """
    Raises:
        ValueError: the path is not a checkpoint directory.
    """
    if not (path / ".metadata").is_file():
        raise ValueError(f"{path} is not a checkpoint directory: no such file {path / '.metadata'}")


@contextmanager
def single_process_dcp() -> Iterator[None]:
    """Silences the warnings of DCP about a process that reads or writes without a process group: here it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # "... disabled", "... unavailable" and the like
        yield
