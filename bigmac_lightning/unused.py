"""Removes kept files that nobody has used for long."""

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

DAYS = 90
"""Days after which a kept file that nobody has used is removed, whenever another one is kept beside it."""


def note_use(path: Path) -> None:
    """Make a file or folder's time of change the time of its last use."""
    with suppress(OSError):  # it is another user's, or the file system can only be read
        os.utime(path)


def remove_unused(folder: Path, name: re.Pattern[str]) -> None:
    """Remove what was not used for `DAYS`, with the file of its lock.

    A process that has mapped such a file keeps it until it ends; one that looks for it by its path makes it again.

    Args:
        name: matches the whole names of files and folders that may be removed. Nothing else is touched.
    """
    oldest = time.time() - DAYS * 24 * 3600
    with suppress(OSError):  # another process removes as well; or it is another user's
        for path in list(folder.iterdir()):
            if name.fullmatch(path.name) and not path.is_symlink():
                with suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                        path.with_suffix(".lock").unlink(missing_ok=True)
