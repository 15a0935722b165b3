"""The table of docs/memory.md is what `python -m benchmarks.memory_settings` prints."""

import pytest

from benchmarks.memory_settings import SETTINGS, largest, row, table
from tests.blocks import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser
PAGE = (ROOT / "docs" / "memory.md").read_text()


def test_the_row_of_the_config() -> None:
    assert f"| the config | {' | '.join(row(largest(SETTINGS['the config'])))} |" in PAGE


@pytest.mark.wide
def test_the_whole_table() -> None:
    assert table() in PAGE
