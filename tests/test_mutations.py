"""The script of small faults keeps up with the code: each fault's line is where the script looks for it."""

import pytest

from tests.mutations import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_can_be_made(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.code) == 1
