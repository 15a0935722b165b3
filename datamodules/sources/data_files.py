"""Data files of sources: patterns of paths, names for errors, and fingerprints."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path


def matching(paths: str | Sequence[str], called: str) -> list[str]:
    """Paths of files.

    Args:
        paths: the paths, or a pattern such as ``shards/*.tar``, whose matches are sorted.
        called: what the error calls the source.

    Raises:
        ValueError: there is no file.
    """
    if isinstance(paths, str):
        pattern = Path(paths)
        paths = sorted(str(path) for path in pattern.parent.glob(pattern.name))
    if not paths:
        raise ValueError(f"{called}: there are no such files")
    return list(paths)


def name_of_all(paths: Sequence[str]) -> str:
    """What errors and logs call several files."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def stamp(paths: Sequence[str | Path]) -> str:
    """A fingerprint: a hash of the names, sizes and times of files. Missing files (broken links) are ignored."""
    stats = [(str(path), found.st_size, found.st_mtime_ns) for path in paths if (found := _stat(path))]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _stat(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
