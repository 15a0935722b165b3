"""Data files of sources: patterns of paths, names for errors, and fingerprints."""

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import remote
from ..files import started_in

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def matching(
    paths: str | Sequence[str], called: str, link_roots: Sequence[str | Path] = (), ending: str = ""
) -> list[str]:
    """Paths of files.

    Args:
        paths: the paths; or a pattern such as ``shards/*.tar``, whose matches are sorted; or one with braces, such as
            ``shards/{000..199}.tar`` or ``{cats,dogs}.tar``, all of whose files must exist; or a folder.
        called: what the error calls the source.
        ending: of the files of a folder that are taken, such as ".tar".
        link_roots: folders into which matches of a pattern may be links, besides the pattern's own folder.

    Raises:
        ValueError: there is no file, or a match of the pattern is a link to another place. A path that is given is
            followed wherever it leads.
    """
    given = paths
    if isinstance(paths, str) and BRACES.search(paths):
        parts = [matching(part, called, link_roots, ending) for part in expanded(paths)]
        paths = [path for part in parts for path in part]
    elif isinstance(paths, str) and remote.is_remote(paths):
        paths = remote.found(paths, ending, called)
    elif isinstance(paths, str):
        pattern = Path(paths) / f"*{ending}" if Path(paths).is_dir() else Path(paths)
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
        raise missing(called, str(given))
    for path in paths:
        check_file(path, called)
    return list(paths)


def check_file(path: str | Path, called: str) -> None:
    """
    Args:
        path: of a file. Remote ones are not checked: they are found when they are read.

    Raises:
        ValueError: there is no such file.
    """
    if not remote.is_remote(path) and not Path(path).is_file():
        raise missing(called, str(path))


def missing(called: str, path: str) -> ValueError:
    """The error for files that are not there."""
    if not remote.is_remote(path) and Path(path).is_dir():
        return ValueError(f"{called}: {path} is a folder, and has no file that can be read: give the path of a file")
    where = "" if remote.is_remote(path) else started_in(path)
    return ValueError(f"{called}: there is no file {path}{where}: correct the path")


def expanded(text: str) -> list[str]:
    """The texts that a text with braces stands for, as in a shell: ``{1..3}``, ``{08..11}``, ``{a,b}``."""
    found = BRACES.search(text)
    if found is None:
        return [text]
    if numbers := RANGE.fullmatch(found[1]):
        first, last = int(numbers[1]), int(numbers[2])
        width = max(map(len, numbers.groups())) if any(n[0] == "0" and n != "0" for n in numbers.groups()) else 0
        step = 1 if first <= last else -1
        choices = [str(number).zfill(width) for number in range(first, last + step, step)]
    else:
        choices = found[1].split(",")
    before, after = text[: found.start()], text[found.end() :]
    return [whole for choice in choices for whole in expanded(f"{before}{choice}{after}")]


def name_of_all(paths: Sequence[str]) -> str:
    """What errors and logs call several files."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def stamp(paths: Sequence[str | Path]) -> str:
    """A fingerprint: a hash of the names, sizes and times of files. Missing files (broken links) are ignored."""
    stats: list[Any] = [(str(path), found.st_size, found.st_mtime_ns) for path in paths if (found := _stat(path))]
    stats += remote.facts([str(path) for path in paths if remote.is_remote(path)])
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _stat(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
