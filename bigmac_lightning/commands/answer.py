"""How commands read their arguments, and how they end: with an exit code, and an error in one line."""

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from bigmac_lightning.schedule.plan import PlanError

PROBLEMS = (ValueError, OSError, ImportError, ArgumentError)
"""What a user can put right; anything else is a fault of ours, and shows where."""


def parser_of(name: str, description: str, options: Callable[..., Any]) -> ArgumentParser:
    """A parser for the arguments of a function."""
    parser = ArgumentParser(prog=f"bigmac {name}", description=description, exit_on_error=False, default_env=False)
    parser.add_function_arguments(options, fail_untyped=True)
    return parser


def answer(name: str, run: Callable[[], object], further: Sequence[type[Exception]] = ()) -> int:
    """Run a command.

    Args:
        further: exceptions that are the user's, too.

    Returns: its exit code: 0, or 2 after an error, which goes to stderr.
    """
    try:
        run()
    except (*PROBLEMS, *further) as problem:
        print(f"bigmac {name}: error: {text_of(problem)}", file=sys.stderr)
        return 2
    return 0


def text_of(problem: Exception) -> str:
    """In one line, of jsonargparse's many the key and what is expected; of a plan that cannot progress, with every
    rank's list below."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))
    if isinstance(problem, PlanError):
        return text
    pattern = r"""Parser key "([^"]*)":.*?Expected (?:an? )?<class '(.*?)'>.*G(?:iven|ot) value: (.*)"""
    wrong = re.match(pattern, text, re.DOTALL)
    if wrong and "is not accepted" not in text:  # which tells more
        key, expected, found = wrong.groups()
        auto = " or auto" if "Literal['auto']" in text else ""
        return f"--{key} is {found.strip().splitlines()[0]}; expected {expected}{auto}"
    return " ".join(text.split())
