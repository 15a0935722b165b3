"""Some of the cases of ``python -m tests.layouts``, in fewer steps; and that the documentation has them all."""

import pytest

from tests.layouts import table
from tests.layouts.cases import FACTORS, Case, cases, narrow
from tests.layouts.measure import measure


@pytest.mark.parametrize("case", narrow(), ids=str)
def test_against_one_process(case: Case) -> None:
    result = measure(case, steps=2, half=False)
    assert result.loss < 1e-6
    assert result.norm < 1e-6
    adapters = case.frozen == "LLM but adapters"  # those of queries and keys: one process is off by 2e-6 itself
    assert result.gradient < (5e-6 if adapters else 2e-6)
    assert result.losses < 1e-5
    assert result.clipped < 1e-6
    assert result.weight < 1e-2  # Adam's first steps are as large for gradients that are nearly rounding


def test_cases_have_every_pair_of_values() -> None:
    """Those that run have each pair that is not refused."""
    made = cases()
    runs = set.union(*(case.pairs() for case in made if not case.refusal))
    refused = set.union(*(case.pairs() for case in made if case.refusal))
    names = list(FACTORS)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for pair in [(a, x, b, y) for x in FACTORS[a] for y in FACTORS[b]]:
                spread_alone = "spread experts" in pair and pair[1][3] == 1
                assert pair in runs or pair in refused or spread_alone, pair
    values = {(name, getattr(case, name)) for case in narrow() for name in FACTORS if name != "mesh"}
    assert len(values) == sum(len(FACTORS[name]) for name in FACTORS if name != "mesh")


def test_the_documentation() -> None:
    """It has a row with numbers for each case that runs, and the reason for each one that is refused."""
    known = table.known()
    assert list(known) == [str(case) for case in cases()], "run: python -m tests.layouts missing"
    for case in cases():
        right = known[str(case)]
        assert right == table.of_refusal(case) if case.refusal else not right.startswith(table.NOT_RUN), case
