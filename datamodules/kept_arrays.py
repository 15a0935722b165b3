"""Arrays that are made once, kept in a file, and mapped into memory by every process that needs them.

The pages of a mapped file belong to the system: all processes of a machine share them, and a process's own memory has
none of them.
"""

import fcntl
import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file

from bigmac_lightning.unused import note_use, remove_unused

Arrays = Mapping[str, np.ndarray]

NAME = re.compile(
    r"([0-9a-f]{24}-[0-9a-f]{16}|(tars|lines|texts)-[0-9a-f]{32}|bins-[0-9a-f]{16}-\d+)\.safetensors(\w{8}\.part)?"
)
"""The names of kept files, and of parts of them that a killed process has left: measurements, indices, and numbers of
bins."""

log = logging.getLogger(__name__)


def mapped(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """
    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or has other arrays.
    """
    try:
        found = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    except (SafetensorError, TypeError) as error:  # numpy has no numbers of 8 bits that other software may write
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if found.keys() != set(names):
        raise ValueError(f"it has the arrays {sorted(found)}, and not {sorted(names)}")
    note_use(path)
    return found


def keep(path: Path, arrays: Arrays) -> None:
    """Write arrays to a file, which appears whole or not at all, also where there has been one before. Other kept files
    that nobody has used for long are removed.

    Raises:
        ValueError: there is no folder for it, and none can be made.
        OSError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"loading.cache_dir={str(path.parent)!r} cannot be made a folder: {error}") from error
    handle, new = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, new)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise
    remove_unused(path.parent, NAME)


def made_once(path: Path, names: Collection[str], make: Callable[[], Arrays], what: str) -> Arrays:
    """The arrays that are kept in a file; if there is none, one process of a machine makes them, and others wait.

    Args:
        names: of the arrays.
        what: what a warning calls them if they cannot be kept.
    """
    try:
        return mapped(path, names)
    except (OSError, ValueError):  # they are not there, or somebody has damaged them
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # some file systems have no locks
        log.warning("%s are not kept: %s", what, error)
        return make()
    with lock:
        try:
            return mapped(path, names)
        except (OSError, ValueError):
            made = make()
        try:
            keep(path, made)
            return mapped(path, names)
        except (OSError, ValueError) as error:
            log.warning("%s are not kept: %s", what, error)
            return made


def of_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of texts, and (n,) where each ends."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def texts_of(content: np.ndarray, ends: np.ndarray) -> list[str]:
    """The texts that `of_texts` has made arrays of."""
    spans = pairwise([0, *ends.tolist()])
    return [content[start:end].tobytes().decode("utf-8", "surrogateescape") for start, end in spans]
