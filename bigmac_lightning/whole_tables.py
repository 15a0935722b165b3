"""Prints tables of which nothing is cut, however narrow the terminal is, or if there is none."""

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table

LONGEST = 10_000
"""Columns that are enough for any table."""


def print_whole(console: Console, table: RenderableType) -> None:
    """Print a table, or several things, as wide as they are if the output is no terminal; in a terminal as wide as this
    is, but wide enough that no word and no number is cut. A terminal that is narrower than that breaks its lines."""
    before = console.width
    console.width = LONGEST
    for part in table.renderables if isinstance(table, Group) else [table]:
        if isinstance(part, Table):
            _keep_words(console, part)
    least, most = Measurement.get(console, console.options, table)
    console.width = max(most, 1) if not console.is_terminal else max(before, least)
    try:
        console.print(table, soft_wrap=False, crop=False)
    finally:
        console.width = before


def _keep_words(console: Console, table: Table) -> None:
    """Let no column become narrower than its longest word; without this, all become narrower alike."""
    for column in table.columns:
        sizes = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
        column.min_width = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
