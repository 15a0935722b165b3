"""How commands parse their arguments and how they end: with an exit code, and with an error in one line."""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from bigmac_lightning.schedule.plan import PlanError

PROBLEMS = (ValueError, OSError, ImportError, ArgumentError)
"""Errors that a user can put right. All other exceptions are faults of this package and keep their traceback."""

PARSER: Mapping[str, Any] = MappingProxyType({"exit_on_error": False, "allow_abbrev": False})
"""Arguments of every parser: errors are raised, and options have to be written out, as in configs."""

WRONG_FIELD = (
    r"""Problem with given class_path .*: Parser key "([^"]*)": Expected an? <class '(.*?)'>.* Got value: (.*)"""
)
"""What jsonargparse says of a dataclass's field with a value of the wrong type."""
OTHER_SUBTYPE = re.compile(r"Import path \S+ does not correspond to a subclass of ")
"""What it says of a class that has another of several possible types."""


class Suggesting:
    """For classes of parsers: an unknown option is answered with the known one that is most like it."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown is not None and "did you mean" not in message:  # an error of a subcommand comes here again
            options: Any = vars(self)["_option_string_actions"]
            longer = [option for option in options if option.startswith(unknown[1])]
            if near := longer[:1] or get_close_matches(unknown[1], options, 1, 0.75):
                message = f"{message}; did you mean {near[0]}?"
        return super().error(message, ex)  # pyright: ignore[reportAttributeAccessIssue]


class Parser(Suggesting, ArgumentParser):
    """The parser of commands that read no config."""


def parser_of(
    name: str,
    description: str,
    options: Callable[..., Any],
    positional: bool = False,
    files: Mapping[str, str] = MappingProxyType({}),
) -> ArgumentParser:
    """A parser for the arguments of a function.

    Args:
        positional: whether arguments without a default are given by their places.
        files: help of the arguments that take any number of files, by name.
    """
    parser = Parser(prog=f"bigmac {name}", description=description, default_env=False, **PARSER)
    parser.add_function_arguments(options, as_positional=positional, skip={*files}, fail_untyped=True)
    for argument, text in files.items():
        parser.add_argument(f"--{argument}", nargs="+", default=[], metavar="FILE", help=text)
    return parser


def answer(name: str, run: Callable[[], object], further: Sequence[type[Exception]] = ()) -> int:
    """Run a command.

    Args:
        further: further exceptions that a user can put right.

    Returns: the exit code: 0, or 2 after an error, which is printed to stderr.
    """
    try:
        run()
    except (*PROBLEMS, *further) as problem:
        print(f"bigmac {name}: error: {text_of(problem)}", file=sys.stderr)
        return 2
    return 0


def text_of(problem: Exception) -> str:
    """The error in one line. A plan that cannot progress has every rank's list below, and broken examples have a line
    each.

    Of the many lines of jsonargparse, only the key, its value and what is expected are shown; of an error about a file,
    its name and what is wrong.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))
    text = re.sub(r"\[Errno \d+\] ([^:;\n]*): '([^'\n]*)'", r"\2: \1", text)
    if isinstance(problem, PlanError):
        return text
    key = re.match(r'Parser key "([^"]*)":', text)
    if reasons := _reasons_of_union(text):
        inside, reasons = _keys_inside(reasons)
        if key is not None and (inner := re.search(WRONG_FIELD, reasons[0])):
            return f"--{'.'.join((key[1], *inside, inner[1]))} is {inner[3]}; expected {inner[2]}"
        said = "; ".join(reasons)
        if missing := re.search(r"No module named '([^'.]*)", said):
            said += (
                f". If {missing[1]}.py is a file of your own, start the command in its folder, or copy it into the one "
                "in which you start it"
            )
        said += _meant(said)
        return said if key is None else f"--{'.'.join((key[1], *inside))}: {said}"
    pattern = r"""Parser key "([^"]*)":.*?Expected (?:an? )?<class '(.*?)'>.*G(?:iven|ot) value: (.*)"""
    wrong = re.match(pattern, text, re.DOTALL)
    if wrong and "is not accepted" not in text:  # this text names the wrong key
        key, expected, found = wrong.groups()
        if option := re.match(r"NestedArg\(key='([^']*)'", found):
            return (
                f"--{key}.{option[1]}: --{key} is a name, which has no options; give its class (class_path in a config)"
            )
        auto = " or auto" if "Literal['auto']" in text else ""
        return f"--{key} is {found.strip().splitlines()[0]}; expected {expected}{auto}"
    if type(problem).__module__.startswith("bigmac_lightning."):  # its text is made of lines
        return "\n".join(" ".join(line.split()) for line in text.splitlines())
    return " ".join(text.split())


def _reasons_of_union(text: str) -> list[str]:
    """Why a value of several possible types was refused, without the types that it just does not have.

    The values in jsonargparse's text, which may be whole configs, are left out.
    """
    if "Does not validate against any of the Union subtypes" not in text or "Errors:" not in text:
        return []
    errors = text.split("Errors:", 1)[1].split("Given value type", 1)[0]
    reasons = [" ".join(reason.split()) for reason in re.split(r"\n\s+- ", errors)]
    reasons = [reason for reason in reasons if reason and not reason.startswith(("Expected a", "Does not validate"))]
    of_values = [reason for reason in reasons if not OTHER_SUBTYPE.match(reason)]
    return of_values or reasons


def _meant(said: str) -> str:
    """A hint at the argument of a class that is most like one that it does not have."""
    wrong = re.search(r"class_path '([\w.]+)\.(\w+)': .*'(\w+)' is not accepted", said)
    made = wrong and getattr(sys.modules.get(wrong[1]), wrong[2], None)
    if not wrong or made is None:
        return ""
    near = get_close_matches(wrong[3], inspect.signature(made).parameters, 1, 0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _keys_inside(reasons: Sequence[str]) -> tuple[list[str], list[str]]:
    """The keys that lead from the key of an error to those of its reasons, and the reasons.

    Where a value of several types has such values inside, jsonargparse gives the reasons of all of them in turn.
    """
    outer = [re.search(r'Parser key "([^"]*)": Does not validate .* Errors:$', reason) for reason in reasons]
    keys = [found[1] for found in outer if found is not None]
    left = [reason for reason, found in zip(reasons, outer, strict=True) if found is None]
    return (keys, left) if left else ([], list(reasons))
