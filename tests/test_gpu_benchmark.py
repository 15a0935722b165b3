"""`python -m benchmarks.gpu`, which has numbers only from GPUs, runs on the CPU with a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.measuring import REMEMBERED
from benchmarks.gpu.model import DDP


def test_the_command(tmp_path: Path) -> None:
    few = ["--policies", "nested", DDP, "--repeats", "1", "--microbatches", "2"]
    command.main(["--tiny", *few, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["policy"]: row for row in found["steps"]}
    assert list(rows) == ["nested", DDP]
    assert all(row["seconds"] > 0 and min(row["busy"]) > 0 for row in rows.values())
    assert all((row["planned"] is None) == (name == DDP) for name, row in rows.items())
    peaks = {policy: [row["peak"] for row in found["memory"] if row["policy"] == policy] for policy in REMEMBERED}
    assert peaks["nested"][0] == peaks["nested"][-1]
    assert peaks["upfront"][0] < peaks["upfront"][-1]
    assert found["overlap"]["together"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in text for name in rows)
    assert "is hidden" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "add --tiny"),
        (["--tiny", "--backend", "nccl"], "--backend nccl"),
        (["--tiny", "--microbatches", "3"], "DDP"),
    ],
)
def test_what_it_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
