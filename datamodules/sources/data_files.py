"""Data files of sources: patterns of paths, names for errors, and fingerprints."""

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path


def matching(paths: str | Sequence[str], called: str, link_roots: Sequence[str | Path] = ()) -> list[str]:
    """Paths of files.

    Args:
        paths: the paths, or a pattern such as ``shards/*.tar``, whose matches are sorted.
        called: what the error calls the source.
        link_roots: folders into which matches of a pattern may be links, besides the pattern's own folder.

    Raises:
        ValueError: there is no file, or a match of the pattern is a link to another place. A path that is given is
            followed wherever it leads.
    """
    if isinstance(paths, str):
        pattern = Path(paths)
        found = sorted(pattern.parent.glob(pattern.name))
        roots = [pattern.parent.resolve(), *(Path(root).resolve() for root in link_roots)]
        for path in found if glob.has_magic(pattern.name) else ():
            place = path.resolve()
            if not any(place.is_relative_to(root) for root in roots):
                raise ValueError(
                    f"{called}: {path} is a link to {place}. If it is meant, set link_roots=[{str(place.parent)!r}], "
                    "or give a list of paths instead of a pattern"
                )
        paths = [str(path) for path in found]
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
