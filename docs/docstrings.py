"""Prepares docstrings for the API reference. They are Google's, and three of this project's habits are rewritten here:
one line for several parameters, ``Returns:`` in the line of its text, and ``::`` before an example."""

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<text>.*(?:\n(?P=indent) +.*)*)$", re.MULTILINE)
RESULT = re.compile(r"^(?P<title>Returns|Yields): (?P<text>.*(?:\n +.*)*)$", re.MULTILINE)
NAME = re.compile(r"(?<!`)`([A-Z]\w+)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed. Names of public classes become links."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        public = {}
        for package in ("", "callbacks", "models", "datamodules"):
            module = pkg[package] if package else pkg
            names = module.exports or ()
            public |= {str(name): f"{module.path}.{name}" for name in names if str(name)[0].isupper()}
        self._rewrite(pkg, public)

    def _rewrite(self, thing: griffe.Object, public: dict[str, str]) -> None:
        if thing.docstring is not None:
            thing.docstring.value = rewritten(thing.docstring.value, public)
        for member in thing.members.values():
            if isinstance(member, griffe.Object):
                self._rewrite(member, public)


def rewritten(text: str, public: dict[str, str]) -> str:
    """A docstring as griffe and Markdown take it.

    Args:
        public: names that become links, and what they lead to.
    """
    text = SEVERAL.sub(_one_each, text)
    text = RESULT.sub(lambda found: f"{found['title']}:\n    {found['text']}", text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return NAME.sub(lambda found: f"[`{found[1]}`][{public[found[1]]}]" if found[1] in public else found[0], text)


def _one_each(found: re.Match[str]) -> str:
    return "\n".join(f"{found['indent']}{name}:{found['text']}" for name in found["names"].split(", "))
