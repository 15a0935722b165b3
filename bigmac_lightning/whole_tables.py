"""Prints tables of which nothing is cut, however narrow the terminal is, or if there is none."""

from rich.console import Console, RenderableType
from rich.measure import Measurement

LONGEST = 10_000
"""Columns that are enough for any table."""


def print_whole(console: Console, table: RenderableType) -> None:
    """Print a table, or several things, as wide as they are if the output is no terminal; in a terminal as wide as this
    is, but wide enough that no word and no number is cut. A terminal that is narrower than that breaks its lines."""
    before = console.width
    console.width = LONGEST
    least, most = Measurement.get(console, console.options, table)
    console.width = max(most, 1) if not console.is_terminal else max(before, least)
    try:
        console.print(table, soft_wrap=False, crop=False)
    finally:
        console.width = before
