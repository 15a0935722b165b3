"""Checkpoints as files and directories on a disk: put in place only when complete, with no moment that has none.

Knows paths; knows nothing of what is in them, and no ranks.
"""

import shutil
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it is put in place; what an interrupted save has left there is removed."""
    place = path.with_name(path.name + ".unfinished")
    remove(place)
    return place


def put(complete: Path, path: Path) -> None:
    """Move a complete checkpoint to its place, over an older one.

    A file takes the older one's place at once. A directory cannot: the older one is moved aside first, where `present`
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
    """Whether there is a checkpoint directory at a path, which may be none of a local disk."""
    return any(place.is_dir() for place in (Path(path), _aside(Path(path))))


def remove(path: Path) -> None:
    """Delete a checkpoint, file or directory, if it is there; of a link, the link alone.

    A directory is given another name first: half of one is not to be found as a checkpoint.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(path.name + ".removed")
    if gone.exists():
        shutil.rmtree(gone)
    shutil.rmtree(path.rename(gone))


def _aside(path: Path) -> Path:
    """With the same ending, by which Lightning finds the last of a folder's checkpoints."""
    return path.with_name(f"{path.stem}.replaced{path.suffix}")
