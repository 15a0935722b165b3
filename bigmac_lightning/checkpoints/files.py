"""Checkpoints as files and directories: their places, whatever is in them. saves.py has those of remote directories.

A checkpoint is put in its place only when it is complete, and there is no moment at which neither the old one nor the
new one can be found.
"""

import shutil
from pathlib import Path

from bigmac_lightning.checkpoints import saves
from bigmac_lightning.checkpoints.marker import is_whole
from bigmac_lightning.checkpoints.remote import Place, RemotePath

UNFINISHED, REPLACED = ".unfinished", ".replaced"
"""Endings: of a checkpoint that is being written, and of the name of an older one that waits until it is replaced."""


def unfinished(path: Place) -> Place:
    """Where a checkpoint is written before it is put in place.

    What an interrupted save has left there is removed; but if it is complete, and the only checkpoint, then it is put
    in place first.
    """
    if isinstance(path, RemotePath):
        return saves.new(path)
    place = _unfinished(path)
    if not path.exists() and is_whole(place):
        put(place, path)
    remove(place)
    return place


def put(complete: Place, path: Place) -> None:
    """Move a complete checkpoint to its place, over an older one.

    A file replaces the older one in one step. A directory cannot: the older one is moved aside first, where `present`
    finds it if the process ends before the new one is in place.
    """
    if isinstance(complete, RemotePath):
        assert isinstance(path, RemotePath)
        saves.put(complete, path)
        return
    assert isinstance(path, Path)
    if complete.is_file() and not path.is_dir():
        complete.replace(path)
        remove(_aside(path))
        return
    aside = _aside(path)
    if path.exists() or path.is_symlink():
        remove(aside)
        path.rename(aside)
        try:
            complete.rename(path)
        except OSError:
            aside.rename(path)
            raise
    else:
        complete.rename(path)
    remove(aside)


def present(path: Place) -> Place:
    """The checkpoint at a path. If a save was interrupted that had put it away, or that had written it and not yet put
    in place, it is found as well.

    Raises:
        FileNotFoundError: there is none.
    """
    if isinstance(path, RemotePath):
        return saves.present(path)
    if path.exists():
        return path
    if is_whole(_unfinished(path)):  # it is newer than one that was moved aside
        return _unfinished(path)
    if _aside(path).exists():
        return _aside(path)
    where = "" if path.is_absolute() else f" (in {Path.cwd()}, where this was started)"
    raise FileNotFoundError(f"there is no checkpoint at {path}{where}")


def in_folder(folder: Place, ending: str = ".ckpt") -> list[Place]:
    """The paths of all checkpoints with this ending in a folder, whole or not: each is to be given to `present`."""
    if isinstance(folder, RemotePath):
        return [place for place in folder.iterdir() if place.suffix == ending]
    found = set[Path]()
    for place in folder.iterdir() if folder.is_dir() else ():
        path = place.with_name(place.name.removesuffix(UNFINISHED))
        if path.suffix == ending:
            found.add(path.with_name(path.stem.removesuffix(REPLACED) + ending))
    return sorted(found)


def remove(path: Place) -> None:
    """Delete a checkpoint, file or directory, if it is there. Of a link only the link is deleted.

    A directory is renamed first, so that a half-deleted one is never found as a checkpoint.
    """
    if isinstance(path, RemotePath):
        saves.remove(path)
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(path.name + ".removed")
    if gone.exists():
        shutil.rmtree(gone)
    shutil.rmtree(path.rename(gone))


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)


def _aside(path: Path) -> Path:
    """Where an older checkpoint waits. The name has the same ending, by which Lightning finds a folder's last one."""
    return path.with_name(f"{path.stem}{REPLACED}{path.suffix}")
