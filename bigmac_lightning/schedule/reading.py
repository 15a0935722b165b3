"""Reads values from the JSON of plan and workload files; errors name the file, the key and the expected value."""

import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Reader:
    """Reads values from one object of a JSON file.

    Args:
        data: the parsed object.
        source: name of the file, and of the place in it, for errors.
        error: class of the exceptions to raise.

    All methods raise `error` if a key is missing or its value is not as expected.
    """

    def __init__(self, data: Any, source: str, error: type[ValueError]) -> None:
        self.source = source
        self.error = error
        if not isinstance(data, dict):
            raise error(f"{source}: expected a JSON object, found {_show(data)}")
        self.data: dict[str, Any] = data

    @classmethod
    def of_format(cls, text: str, source: str, error: type[ValueError], kind: str, keys: set[str]) -> "Reader":
        """Read an object whose key "format" says that it is of this kind, and which has no other keys than these."""
        reader = cls(parse_json(text, source, error), source, error)
        if reader.text("format") != kind:
            raise reader.refuse("format", json.dumps(kind), reader.data["format"])
        reader.only({"format", *keys})
        return reader

    def refuse(self, key: str, expected: str, found: Any) -> ValueError:
        """Return the exception for a wrong value."""
        return self.error(f"{self.source}: {key}: expected {expected}, found {_show(found)}")

    def get(self, key: str, expected: str) -> Any:
        """Return the value of a key, which must exist; `expected` describes the value in the error."""
        if key not in self.data:
            raise self.error(f"{self.source}: {key} is missing; expected {expected}")
        return self.data[key]

    def only(self, keys: set[str]) -> None:
        """Check that the object has no other keys: an unknown key is most likely a typing error."""
        if unknown := sorted(self.data.keys() - keys):
            raise self.error(f"{self.source}: {unknown[0]}: no such key; known are {', '.join(sorted(keys))}")

    def text(self, key: str) -> str:
        """Return a string."""
        value = self.get(key, "a string")
        if not isinstance(value, str):
            raise self.refuse(key, "a string", value)
        return value

    def integer(self, key: str, least: int) -> int:
        """Return an integer that is at least `least`."""
        expected = f"an integer of at least {least}"
        value = self.get(key, expected)
        if not is_integer(value) or value < least:
            raise self.refuse(key, expected, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number of at least 0; the default, if there is one, where the key is missing."""
        expected = "a number of at least 0"
        value = self.get(key, expected) if default is None else self.data.get(key, default)
        if not is_amount(value):
            raise self.refuse(key, expected, value)
        return value

    def items(self, key: str, expected: str, item: Callable[[Any], bool]) -> list[Any]:
        """Return a list. Each of its items must pass the check `item`."""
        value = self.get(key, expected)
        if not isinstance(value, list):
            raise self.refuse(key, expected, value)
        for position, entry in enumerate(value):
            if not item(entry):
                raise self.refuse(f"{key}[{position}]", f"{expected}; this one is wrong", entry)
        return value

    def rows(self, key: str, expected: str, item: Callable[[Any], bool]) -> list[list[Any]]:
        """Return a list of lists. Each item of the inner lists must pass the check `item`."""
        rows = self.items(key, expected, lambda row: isinstance(row, list))
        for number, row in enumerate(rows):
            for position, entry in enumerate(row):
                if not item(entry):
                    raise self.refuse(f"{key}[{number}][{position}]", f"{expected}; this one is wrong", entry)
        return rows


def is_integer(value: Any) -> bool:
    """Whether a value is an integer. ``True`` and ``False`` do not count as integers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_amount(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return (is_integer(value) or isinstance(value, float)) and math.isfinite(value) and value >= 0


def parse_json(text: str, source: str, error: type[ValueError]) -> Any:
    """Return the parsed JSON; raise `error` with the file and the position if the text is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(f"{source}: not JSON: {problem}") from None


def read_text(path: str, error: type[ValueError]) -> str:
    """Return the text of a file; raise `error` with its name if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "not UTF-8 text"
        raise error(f"{path}: cannot be read: {reason}") from None


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
