"""Lets the processes of a run end with the process that started them, a Trainer's or torchrun's, however that ends.

A process that hangs, or that was stopped, hears no other signal. Linux only; elsewhere nothing is done.
"""

import ctypes
import os
import signal
import sys

STARTED_BY = "BIGMAC_STARTED_BY"
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


def name_parent() -> None:
    """Say that this process is going to start others."""
    os.environ[STARTED_BY] = str(os.getpid())


def end_with_parent() -> None:
    """Let this process be killed when the one that has started it ends. Nothing is done if no Trainer has started it.

    If that one has ended already, this one ends at once.
    """
    parent = int(os.environ.get(STARTED_BY, 0))
    if not parent or parent == os.getpid():
        return
    if os.getppid() == parent:
        _set(signal.SIGKILL)
    if os.getppid() != parent and not _exists(parent):  # asked for after the signal is set: it may have ended meanwhile
        sys.stderr.write("the process that started this rank has ended, and so does this one\n")
        os._exit(1)


def end_with_agent() -> None:
    """Let this process be killed when torchrun's agent, which has started it, ends, as another agent may take over."""
    _set(signal.SIGKILL)


def outlive_parent() -> None:
    """Let this process go on when the one that has started it ends."""
    if int(os.environ.get(STARTED_BY, 0)) == os.getppid():
        _set(0)


def _set(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, int(number))


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
