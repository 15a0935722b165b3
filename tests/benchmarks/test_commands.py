"""The commands of benchmarks work on tiny input; what they measure then means nothing."""

import math
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import many_samples, measured_costs, paper_workload, predictions, saving, timelines


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """As in a terminal: the command line's library warns of how Lightning uses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.wide
def test_predictions_beside_what_is_measured() -> None:
    found = predictions.measured("digits", 9)
    assert list(found) == ["step, s", "told / step", "plans / step", "replayed", "peak activations, MB", "told / peak"]
    assert all(math.isfinite(number) and number > 0 for number in found.values()), found
    assert 0.9 < found["replayed"] < 1.05, "plans take as long as they say, if their actions do"
    assert 0.9 < found["told / peak"] < 1.1


@pytest.mark.wide
def test_saving(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["saving", "--blocks", "1"])
    saving.main()
    assert "background" in capfd.readouterr().out


@pytest.mark.wide
def test_the_index_of_tars(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["many_samples", "--shards", "3", "--samples", "20"])
    many_samples.main()
    assert "60 samples" in capfd.readouterr().out


def test_measured_costs(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--ranks 2 --microbatches 4 --unit 0.0005 --repeats 1 --encoder 2 --generator 2"
    monkeypatch.setattr(sys, "argv", ["measured_costs", *options.split()])
    measured_costs.main()
    assert "measured" in capfd.readouterr().out


def test_the_workload_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["paper_workload", "--folder", str(tmp_path)])
    paper_workload.main()
    assert (tmp_path / "paper_workload.json").stat().st_size > 1000


def test_timelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has run its whole plan, one action after another, and the picture is written."""
    made = timelines.plans(2, 3)
    for rank, results in enumerate(timelines.run_ranks(2, timelines.executed, made, 0.001)):
        for plan, spans in zip(made, results, strict=True):
            assert sorted(str(action) for action, _, _ in spans) == sorted(map(str, plan.ranks[rank]))
            assert all(end <= start for (_, _, end), (_, start, _) in pairwise(spans))
    options = f"--ranks 2 --microbatches 3 --unit_ms 1 --output {tmp_path}/x.png"
    monkeypatch.setattr(sys, "argv", ["timelines", *options.split()])
    timelines.main()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
