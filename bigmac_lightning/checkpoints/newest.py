"""The newest whole checkpoint of some folders, and why others are left out."""

from collections.abc import Iterable
from pathlib import Path

from bigmac_lightning.checkpoints import files, marker


def newest_whole(folders: Iterable[tuple[Path, str]]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and in words why newer ones, and such as cannot be dated, are skipped.

    Args:
        folders: folders of checkpoints, with the ending of their names.
    """
    candidates: dict[Path, Path] = {}
    skipped: list[str] = []
    for path in (path for folder, ending in folders for path in files.in_folder(folder, ending)):
        try:
            place = files.present(path)
        except FileNotFoundError as error:
            skipped.append(f"{path}: {_unfinished_reason(path) or error}")
            continue
        candidates.setdefault(place.resolve(), place)
    dated: list[tuple[float, Path]] = []
    for place in candidates.values():
        try:
            dated.append((marker.saved_at(place), place))
        except (OSError, ValueError) as error:
            skipped.append(f"{place}: {error}")
    for _, place in sorted(dated, reverse=True):
        if problems := marker.problems(place):
            skipped.append(f"{place}: {problems[0]}")
            continue
        return place, skipped
    return None, skipped


def in_words(skipped: list[str]) -> str:
    """What follows a sentence about checkpoints that were found."""
    return f"; not whole, and skipped: {'; '.join(skipped)}" if skipped else ""


def _unfinished_reason(path: Path) -> str | None:
    place = path.with_name(path.name + files.UNFINISHED)
    if not place.exists():
        return None
    if place.is_dir() and not (place / marker.MARKER).exists():
        return f"{place} was not written to its end: it has no {marker.MARKER}"
    return next(iter(marker.problems(place, contents=False)), None)
