"""Which checkpoint a run resumes from: `ckpt_path="auto"` and "last".

Rank 0 looks for it in the run's folders, so that all ranks have the same answer, and also finds what an interrupted
save has left. Lightning itself would look for the last one on each rank, and only for those in their final place.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from bigmac_lightning.checkpoints import files, marker
from bigmac_lightning.checkpoints.agreement import on_first_rank
from bigmac_lightning.checkpoints.newest import in_words, newest_whole
from bigmac_lightning.checkpoints.remote import Place, at

AUTO = "auto"
LAST = "last, of all ranks"
"""What `launching.find_last` makes of "last", which Lightning would replace by a path on each rank."""


class NoCheckpoint(dict[str, Any]):
    """What Lightning gets where there is no checkpoint: it is false, so nothing is restored from it."""

    def __init__(self) -> None:
        super().__init__({"pytorch-lightning_version": lightning.__version__})

    def __bool__(self) -> bool:
        return False


def find(trainer: pl.Trainer, asked: str) -> str | None:
    """The path that "auto" or "last" stands for; ``None``: there is none, and the run starts anew. Collective.

    Raises:
        ValueError: there is none, and the run would evaluate weights that nobody has trained.
    """
    look = _newest_whole if asked == AUTO else _last
    found, said = on_first_rank(lambda: look(trainer), f"ckpt_path={asked!r} cannot be found")
    if found is None and asked == AUTO and not trainer.training:
        raise ValueError(f'ckpt_path="auto": {said}, so there are no weights to evaluate')
    tell = rank_zero_info if found is not None or asked == AUTO else rank_zero_warn
    tell(f'ckpt_path="{asked if asked == AUTO else "last"}": {said}')
    return found


def _newest_whole(trainer: pl.Trainer) -> tuple[str | None, str]:
    """The checkpoint, and in words what was found."""
    folders = list(dict.fromkeys(_folders(trainer)))
    found, skipped = newest_whole(folders)
    if found is not None:
        return str(found), f"the run resumes from {found}{in_words(skipped)}"
    where = ", ".join(str(folder) for folder, _ in folders) or "no folder"
    return None, f"there is no whole checkpoint in {where}; the run starts anew{in_words(skipped)}"


def _last(trainer: pl.Trainer) -> tuple[str | None, str]:
    """The newest of those that Lightning calls last, as `_newest_whole`; it is refused later if it is not whole."""
    paths = {at(found) for callback in trainer.callbacks if (found := _on_exception(callback))}  # pyright: ignore
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            folder, name = at(str(callback.dirpath)), callback.CHECKPOINT_NAME_LAST
            start = name.split("{")[0]  # the name may have fields
            paths |= {path for path in files.in_folder(folder, callback.FILE_EXTENSION) if path.stem.startswith(start)}
    dated = [(_saved_at(place), str(place)) for path in paths if (place := _present(path)) is not None]
    links = [path for path in paths if isinstance(path, Path) and path.is_symlink()]
    lost = [f"{path} -> {path.readlink()}" for path in links if _present(path) is None]
    if lost and not dated:
        raise ValueError(
            f'{"; ".join(lost)}: the link leads to nothing, as its save was interrupted. ckpt_path="auto" finds the '
            "newest whole checkpoint"
        )
    if not dated:
        hint = "ModelCheckpoint(save_last=True) saves one"
        return None, f"there is no last checkpoint, so the run starts without one ({hint})"
    found = max(dated)[1]
    return found, f"the run resumes from {found}"


def folders_of_checkpoints(trainer: pl.Trainer) -> list[Place]:
    """The folders in which callbacks of a run save checkpoints; or folders around those that are not yet known."""
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    saving = [*trainer.checkpoint_callbacks, *(one for one in callbacks if getattr(one, "saves_when_stopped", False))]
    root = next((logger.save_dir for logger in trainer.loggers), None) or trainer.default_root_dir
    folders = [getattr(callback, "dirpath", None) or root for callback in saving]
    return list(dict.fromkeys(at(folder) for folder in folders))


def _folders(trainer: pl.Trainer) -> Iterator[tuple[Place, str]]:
    """The folders of this run's checkpoints, of any version of its logger, and the ending of their names."""
    root = str(trainer.default_root_dir)
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None:
            continue
        folder = _real(callback.dirpath)
        yield folder, callback.FILE_EXTENSION
        for logger in trainer.loggers[:1]:  # the folder of a version of the first logger, if Lightning has chosen it
            parent = _real(logger.save_dir or root) / str(logger.name)
            if folder.name == "checkpoints" and folder.parent.parent == parent and parent.is_dir():
                for version in sorted(parent.iterdir()):
                    yield version / "checkpoints", callback.FILE_EXTENSION
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if found := _on_exception(callback):
            yield _real(found).parent, at(found).suffix
        if getattr(callback, "saves_when_stopped", False) and callback.dirpath:  # a PreemptionCheckpoint
            yield _real(callback.dirpath), ".ckpt"
    yield _real(root), ".ckpt"  # where Lightning saves hpc_ckpt_N.ckpt


def _real(path: str | Path) -> Place:
    """A place whose links have been followed."""
    place = at(path)
    return Path(os.path.realpath(place)) if isinstance(place, Path) else place


def _present(path: Place) -> Place | None:
    try:
        return files.present(path)
    except FileNotFoundError:
        return None


def _saved_at(place: Place) -> float:
    try:
        return marker.saved_at(place)
    except marker.unreadable(place):  # it is damaged, as `load_checkpoint` will say
        return place.stat().st_mtime


def _on_exception(callback: Any) -> str | None:
    return callback.ckpt_path if isinstance(callback, OnExceptionCheckpoint) else None
