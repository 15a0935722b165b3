"""Checkpoints as files and directories on a disk, whatever is in them.

A checkpoint is put in its place only when it is complete, and there is no moment at which neither the old one nor the
new one can be found.
"""

import shutil
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it is put in place. What an interrupted save has left there is removed."""
    place = path.with_name(path.name + ".unfinished")
    remove(place)
    return place


def put(complete: Path, path: Path) -> None:
    """Move a complete checkpoint to its place, over an older one.

    A file replaces the older one in one step. A directory cannot: the older one is moved aside first, where `present`
    finds it if the process ends before the new one is in place.
    """
    if complete.is_file() and not path.is_dir():
        complete.replace(path)
        return
    aside = _aside(path)
    if path.exists() or path.is_symlink():
        remove(aside)
        path.rename(aside)
    complete.rename(path)
    remove(aside)


def present(path: Path) -> Path:
    """The checkpoint at a path, or the one that a save was about to replace when it was interrupted.

    Raises:
        FileNotFoundError: there is none.
    """
    found = next((place for place in (path, _aside(path)) if place.exists()), None)
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return found


def is_directory(path: str | Path) -> bool:
    """Whether there is a checkpoint directory at a path. The path may also be an address in a remote file system."""
    return any(place.is_dir() for place in (Path(path), _aside(Path(path))))


def remove(path: Path) -> None:
    """Delete a checkpoint, file or directory, if it is there. Of a link only the link is deleted.

    A directory is renamed first, so that a half-deleted one is never found as a checkpoint.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(path.name + ".removed")
    if gone.exists():
        shutil.rmtree(gone)
    shutil.rmtree(path.rename(gone))


def _aside(path: Path) -> Path:
    """Where an older checkpoint waits. The name has the same ending, by which Lightning finds a folder's last one."""
    return path.with_name(f"{path.stem}.replaced{path.suffix}")
