"""Errors of a training that a user can put right: one line of one rank. All others keep their traceback."""

import dis
import os
import sys
import sysconfig
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException

from bigmac_lightning.commands.answer import text_of
from bigmac_lightning.training.watching import is_of_another_rank

TRACEBACK = "BIGMAC_TRACEBACK"
"""The environment variable with which all errors keep their traceback."""
RAISE = dis.opmap["RAISE_VARARGS"]


@contextmanager
def plain_errors(command: str) -> Generator[None]:
    """Lets errors that a user can put right end the command with one line, which one rank shows."""
    try:
        yield
    except Exception as error:
        if os.environ.get(TRACEBACK) or not is_plain(error):
            raise
        if not is_of_another_rank(error):
            print(f"bigmac {command}: error: {text_of(error)}", file=sys.stderr)
        sys.exit(2)


def is_plain(problem: Exception) -> bool:
    """Whether the text of an error says all that a user needs: this package or Lightning has raised it on purpose, or
    the system because of a file, and no code of the user's own has taken part."""
    steps, libraries = list(_steps(problem)), tuple(map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
    for step in steps:
        if not (_is_own(step) or step.tb_frame.f_code.co_filename.startswith(libraries)):
            return False
    if isinstance(problem, (OSError, ImportError, MisconfigurationException)):
        return True
    last = next((step for step in steps if step.tb_next is None), None)
    raised = last is not None and last.tb_frame.f_code.co_code[last.tb_lasti] == RAISE and _is_own(last)
    return isinstance(problem, (ValueError, TypeError)) and raised


def _steps(error: BaseException | None) -> Iterator[TracebackType]:
    """The steps of the traceback of an error, and then those of its causes."""
    while error is not None:
        step = error.__traceback__
        while step is not None:
            yield step
            step = step.tb_next
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_own(step: TracebackType) -> bool:
    return step.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "bigmac_lightning"
