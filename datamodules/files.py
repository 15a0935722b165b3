"""Files of media: whole files, parts of files, and bytes that are read when they are needed."""

import io
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from bigmac_lightning.file_part import FilePart

from . import remote
from .errors import ExampleError

Roots = str | Path | remote.Folder | Sequence[str | Path | remote.Folder]
"""A folder of media, or several folders: paths are relative to the first one, and links may lead into all of them. One
folder may be remote."""


@dataclass(frozen=True)
class File:
    """A file, a part of a file, or anything else that `opener` opens.

    Attributes:
        name: what errors call it.
        opener: returns a seekable binary stream.
    """

    name: str
    opener: Callable[[], BinaryIO]

    @classmethod
    def at(cls, path: str | Path, root: Roots | None = None) -> "File":
        """A file on disk.

        Args:
            path: relative to the root, or to the first root.
            root: folders, one of which must contain the file after symbolic links have been resolved; ``None``: any.

        Raises:
            ExampleError: the path leads out of these folders, or its links form a circle.
        """
        if root is None:
            return cls(str(path), partial(_open_file, str(path)))
        roots = roots_of(root)
        if isinstance(roots[0], remote.Folder):
            try:
                address = roots[0].file(str(path))
            except ValueError as error:
                raise ExampleError(f"{str(path)!r} leads out of the media root {roots[0]}") from error
            return cls(address, partial(remote.opened, address))
        whole = roots[0] / path
        try:
            place = whole.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise ExampleError(f"{str(path)!r} leads nowhere: {error}") from error
        if not any(place.is_relative_to(folder.resolve()) for folder in roots):
            allowed = ", ".join(str(folder) for folder in roots)
            raise ExampleError(
                f"{str(path)!r} leads out of the media root: it is {place}, and only files below {allowed} are read. "
                f"If it is meant, give media_root as a list, with {place.parent} after {roots[0]}"
            )
        return cls(str(whole), partial(_open_file, str(place)))

    @classmethod
    def inside(cls, path: str | Path, name: str, offset: int, length: int) -> "File":
        """A range of bytes of a file, such as a member of an uncompressed tar. The file may be remote."""
        return cls(
            f"{path}: {name}", partial(remote.part if remote.is_remote(path) else _read_part, str(path), offset, length)
        )

    @classmethod
    def lazy(cls, name: str, load: Callable[[], bytes]) -> "File":
        """The bytes that a function returns. It is called when the file is opened."""
        return cls(name, partial(_read_lazily, load))

    def open(self) -> BinaryIO:
        return self.opener()


def roots_of(given: Roots) -> Any:
    """The folders as a tuple: of paths, or of one `remote.Folder`.

    Raises:
        ValueError: there is no folder, or a remote one and others.
    """
    roots = [given] if isinstance(given, str | Path | remote.Folder) else list(given)
    if not roots:
        raise ValueError("media_root is an empty list: give one folder at least")
    distant = [root for root in roots if remote.is_remote(root) or isinstance(root, remote.Folder)]
    if distant and len(roots) > 1:
        raise ValueError(
            f"media_root has {distant[0]}, which is remote, and others: give one folder, as it has no links"
        )
    if distant:
        return (distant[0] if isinstance(distant[0], remote.Folder) else remote.Folder(str(distant[0])),)
    return tuple(Path(str(folder)) for folder in roots)


def folders_of(given: Roots, called: str) -> Any:
    """As `roots_of`, of a source that begins.

    Args:
        called: the argument's name.

    Raises:
        ValueError: see `roots_of`; or a folder on disk is not there.
    """
    roots = roots_of(given)
    for folder in roots:
        if isinstance(folder, Path) and not folder.is_dir():
            raise ValueError(f"{called}: there is no folder {folder}{started_in(folder)}: correct the path")
    return roots


def started_in(path: str | Path) -> str:
    """What an error adds to a path that is not there."""
    return "" if Path(path).is_absolute() else f" (in {Path.cwd()}, where this was started)"


def opened(path: str | Path) -> BinaryIO:
    """A file, which may be remote."""
    return remote.opened(str(path)) if remote.is_remote(str(path)) else open(path, "rb")


def _open_file(path: str) -> BinaryIO:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
        raise ValueError("it is a folder, a pipe or a device, and no file")
    return open(path, "rb")


def _read_part(path: str, offset: int, length: int) -> BinaryIO:
    return io.BufferedReader(FilePart(open(path, "rb", 0), offset, length))  # it is closed with it


def _read_lazily(load: Callable[[], bytes]) -> BinaryIO:
    return io.BytesIO(load())
