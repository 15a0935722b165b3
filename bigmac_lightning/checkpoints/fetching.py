"""Remote folders of models and processors, such as ``s3://bucket/model``, of which a machine keeps a copy.

The libraries that read such folders take them from a disk only. A copy belongs to the files as they are: if one of them
changes in the remote folder, another copy is made.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bigmac_lightning.unused import note_use, remove_unused

from .remote import RemotePath, at, file_system, is_name

KEPT = "~/.cache/bigmac_lightning/folders"
NAME = re.compile(r"[0-9a-f]{32}(\w{8}\.part)?")
"""The names of copies, and of parts of them that a killed process has left."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of files of weights, which are large."""


def local_folder(path: str | Path | RemotePath, weights: bool = False) -> str:
    """A folder on this machine: the one that is given, or the copy of a remote one. One process makes it; others wait.

    Args:
        weights: whether files of weights are wanted, too.

    Raises:
        ValueError: there is no such remote folder, or it cannot be read: a package or a key may be missing.
    """
    place = at(path)
    if not isinstance(place, RemotePath):
        return str(path)
    if place.of_web:
        raise ValueError(f"{place} is an address of a web server, which does not list a folder: download it")
    try:
        return str(_copy(place, weights))
    except Exception as error:  # file systems raise errors of many libraries
        raise ValueError(f"the folder {place} cannot be read: {type(error).__name__}: {error}") from error


def _copy(place: RemotePath, weights: bool) -> Path:
    system, inner = file_system(place.address)
    system.invalidate_cache()
    found: Mapping[str, Any] = system.find(inner, detail=True)
    names = {name: name.removeprefix(inner.rstrip("/")).lstrip("/") for name in found}
    names = {name: own for name, own in names.items() if weights or not own.endswith(WEIGHTS)}
    if not names or found.keys() == {inner}:
        raise FileNotFoundError(f"there is no such folder, or it has no {'files' if weights else 'config'}")
    if wrong := [name for name, own in names.items() if not all(map(is_name, own.split("/")))]:
        raise ValueError(f"its file {wrong[0]!r} has a name that leads out of it")
    facts = [(own, sorted((key, str(value)) for key, value in found[name].items())) for name, own in names.items()]
    kept = Path(KEPT).expanduser()
    kept.mkdir(parents=True, exist_ok=True)
    copy = kept / hashlib.sha256(repr((place.address, sorted(facts))).encode()).hexdigest()[:32]
    with ExitStack() as stack:
        lock = stack.enter_context(copy.with_suffix(".lock").open("w"))
        # some file systems have no locks: then each process makes a copy, and one of them stays
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if copy.is_dir():
            note_use(copy)
            return copy
        part = Path(tempfile.mkdtemp(dir=kept, prefix=copy.name, suffix=".part"))
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        for own in names.values():
            (part / own).parent.mkdir(parents=True, exist_ok=True)
        system.get(list(names), [str(part / own) for own in names.values()])
        for name, own in names.items():
            if (part / own).stat().st_size != found[name]["size"]:
                raise OSError(f"{own} has {(part / own).stat().st_size} bytes here, and {found[name]['size']} there")
        with suppress(OSError):  # another process, which did not see the lock, was first
            os.rename(part, copy)
            note_use(copy)
        remove_unused(kept, NAME)
    return copy
