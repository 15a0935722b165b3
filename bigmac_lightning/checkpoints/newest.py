"""The newest whole checkpoint of some folders, and why others are left out."""

from collections.abc import Iterable

from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.checkpoints.remote import Place, RemotePath


def newest_whole(folders: Iterable[tuple[Place, str]]) -> tuple[Place | None, list[str]]:
    """The newest checkpoint that is whole, and in words why newer ones, and such as cannot be dated, are skipped.
    Of remote ones only the sizes of files are compared, as all would have to be fetched for their checksums.

    Args:
        folders: folders of checkpoints, with the ending of their names.
    """
    candidates: dict[Place, Place] = {}
    skipped: list[str] = []
    for path in (path for folder, ending in folders for path in files.in_folder(folder, ending)):
        try:
            place = files.present(path)
        except FileNotFoundError as error:
            skipped.append(f"{path}: {_unfinished_reason(path) or error}")
            continue
        candidates.setdefault(place.resolve(), place)
    dated: list[tuple[float, Place]] = []
    for place in candidates.values():
        try:
            dated.append((marker.saved_at(place), place))
        except marker.unreadable(place) as error:
            skipped.append(f"{place}: {error}")
    for _, place in sorted(dated, key=lambda one: (one[0], str(one[1])), reverse=True):
        if problems := marker.problems(place, contents=not isinstance(place, RemotePath)):
            skipped.append(f"{place}: {problems[0]}")
            continue
        return place, skipped
    return None, skipped


def in_words(skipped: list[str]) -> str:
    """What follows a sentence about checkpoints that were found."""
    return f"; not whole, and skipped: {'; '.join(skipped)}" if skipped else ""


def _unfinished_reason(path: Place) -> str | None:
    if isinstance(path, RemotePath):
        return None
    place = path.with_name(path.name + files.UNFINISHED)
    if not place.exists():
        return None
    if place.is_dir() and not (place / marker.MARKER).exists():
        return f"{place} was not written to its end: it has no {marker.MARKER}"
    return next(iter(marker.problems(place, contents=False)), None)
