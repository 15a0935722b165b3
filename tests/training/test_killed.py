"""Runs that are killed and resumed by "auto" make the steps, validations and rates of the undisturbed run, bit for bit.

A few telling cases; ``python -m tests.training.killed`` draws others, and `pytest -m wide` runs those here.
"""

from pathlib import Path

import pytest

from tests.training.killed import check, draw
from tests.training.killed_run import Case, Kill, Layout, make_data

pytestmark = pytest.mark.filterwarnings("ignore")  # what the runs warn of is looked at elsewhere

ONE = (Layout(1),)
FEW = {
    # right after a save at the end of a batch that a validation follows, and of one that an epoch's end follows as well
    "before-validation": Case(
        "toys",
        ONE,
        (Kill(when="save", share=0.2),) * 2,
        schedule="plateau",
        validate=4,
        save=4,
        precision="bf16-true",  # of which more than 8 microbatches are summed in float32, if the first batch has them
    ),
    "before-epoch-end": Case("source", ONE, (Kill(when="save", share=0.2),), validate=-1, save=7),
    # one rank is lost within a step, then all stop at a signal within an accumulation
    "two-kills": Case(
        "mix",
        (Layout(2, workers=1), Layout(2)),
        (Kill("kill one", share=0.5, rank=1), Kill("term one", share=0.3)),
        accumulate=2,
        dropout=0.2,
        async_save=True,
        epochs=1,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", FEW)
def test_killed_runs(name: str, folder: Path, tmp_path: Path) -> None:
    assert len(check(FEW[name], folder, tmp_path)) > 1, "the run was not killed"


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(60))
def test_random_kills(seed: int, folder: Path, tmp_path: Path) -> None:
    check(draw(seed), folder, tmp_path)
