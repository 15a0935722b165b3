"""Whole checkpoints of any strategy, read in one process: a file, or a directory in torch's DCP format."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _METADATA_FILENAME

from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.checkpoints.mismatches import first_few
from bigmac_lightning.checkpoints.parts import MODEL, complete
from bigmac_lightning.checkpoints.remote import Place, at
from bigmac_lightning.checkpoints.safe import load_file, read_all, trusting


class DirectoryCheckpointIO(TorchCheckpointIO):
    """A `CheckpointIO` for strategies that write files. It also reads directories, and the files that Lightning's
    `consolidate_checkpoint` makes of directories."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        options = dict(zip(("map_location", "weights_only"), args, strict=False)) | kwargs
        weights_only = not trusting(options.get("weights_only"))
        place = files.present(at(path))
        if place.is_dir():
            return read_directory(place, weights_only)
        refuse(marker.problems(place), place)
        if not isinstance(place, Path):
            return as_checkpoint(super().load_checkpoint(str(place), weights_only=weights_only), str(place))
        return as_checkpoint(load_file(place, place, weights_only), str(place))


def read_directory(path: Place, weights_only: bool | None = None) -> dict[str, Any]:
    """Everything in a checkpoint directory, in the form that Lightning saves in one process. Only the optimizer states
    differ: they go by the names of parameters.

    Args:
        weights_only: ``False``: read pickles of any kind.

    Raises:
        ValueError: the path is not a checkpoint directory, it is not whole, or it holds what could run code.
    """
    check_directory(path)
    refuse(marker.problems(path), path)
    checkpoint = read_all(path, weights_only)
    if (path / _METADATA_FILENAME).is_file():
        checkpoint.update(load_file(path / _METADATA_FILENAME, path / _METADATA_FILENAME, weights_only))
    return as_checkpoint(checkpoint, str(path))


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


def check_directory(path: Place) -> None:
    """
    Raises:
        ValueError: the path is not a checkpoint directory.
    """
    if not (path / ".metadata").is_file() and not (path / marker.MARKER).exists():
        raise ValueError(f"{path} is not a checkpoint directory: no such file {path / '.metadata'}")


def refuse(problems: list[str], path: Place) -> None:
    """
    Raises:
        ValueError: there are problems with the checkpoint at `path`.
    """
    if problems:
        raise ValueError(f"{NOT_WHOLE.format(path)}: {first_few(problems)}")


NOT_WHOLE = "the checkpoint {} is not whole"
