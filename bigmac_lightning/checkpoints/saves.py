"""Checkpoint directories at remote addresses.

Object stores cannot rename a folder. So each save of a name is a folder of its own, ``x.ckpt/save-1``,
``x.ckpt/save-2``, ..., which is a checkpoint directory like any other: its marker is written last. The checkpoint is
the last save that has a marker, and older ones are deleted after that.
"""

import logging
import re

from lightning.fabric.utilities.load import _METADATA_FILENAME

from bigmac_lightning.checkpoints.marker import MARKER
from bigmac_lightning.checkpoints.remote import RemotePath
from bigmac_lightning.checkpoints.safe import DCP_METADATA

log = logging.getLogger(__name__)

SAVE = re.compile(r"save-(\d+)")
FILE = re.compile(rf"{re.escape(DCP_METADATA)}|{re.escape(_METADATA_FILENAME)}|__\d+_\d+\.distcp")
"""The names of a directory's files, but for the marker."""


def new(path: RemotePath) -> RemotePath:
    """Where the next save is written."""
    return path / f"save-{max((number for number, _ in _saves(path)), default=0) + 1}"


def present(path: RemotePath) -> RemotePath:
    """The checkpoint at an address: its last save that has a marker; or what is there itself, a file or a directory.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.of_web:
        return path
    saves = _saves(path)
    for _, save in reversed(saves):
        if (save / MARKER).exists():
            return save
    if path.is_file() or any((path / name).exists() for name in (MARKER, DCP_METADATA)):
        return path
    why = f": {saves[-1][1]} was not written to its end: it has no {MARKER}" if saves else ""
    raise FileNotFoundError(f"there is no checkpoint at {path}{why}")


def put(save: RemotePath, path: RemotePath) -> None:
    """Delete everything at an address that is older than a complete save. If that fails, the save is good all the same,
    and the next one tries again."""
    try:
        clear(path)
        for _, other in _saves(path):
            if other != save:
                clear(other)
        if path.is_file():
            path.unlink()
    except Exception as error:  # file systems raise errors of many libraries
        log.warning("cannot delete what is older than %s: %s", save, error)


def remove(path: RemotePath) -> None:
    """Delete a checkpoint, a file or a directory. Files that no save writes stay."""
    remove_directory(path)
    if path.is_file():
        path.unlink()


def remove_directory(path: RemotePath) -> None:
    """Delete a checkpoint directory, and not the file that an object store may have under the same name."""
    for place in [path, *(save for _, save in _saves(path)), path]:  # at last it is empty
        clear(place)


def clear(folder: RemotePath) -> None:
    """Delete the files of a checkpoint directory, the marker first, so that it is never found as a part."""
    names = [file.name for file in folder.iterdir()]
    for name in sorted(names, key=lambda name: name != MARKER):
        if name == MARKER or FILE.fullmatch(name):
            (folder / name).unlink()
    folder.rmdir()


def _saves(path: RemotePath) -> list[tuple[int, RemotePath]]:
    """The saves at an address, the last one at the end."""
    return sorted((int(found[1]), place) for place in path.iterdir() if (found := SAVE.fullmatch(place.name)))
