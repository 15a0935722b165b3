"""docs/tutorial.md: its files and commands, in their order, in an empty folder."""

import csv
import re
import shlex
import sys
from pathlib import Path

import pytest

from bigmac_lightning import cli
from tests.cli.commands import run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser


def test_the_installation() -> None:
    """It names an extra that there is. The suite itself runs in such an environment."""
    commands = [line for kind, _, text in BLOCKS for line in text.splitlines() if kind == "bash"]
    [extra] = re.findall(r'^pip install -e "\.\[(\w+)\]"$', "\n".join(commands), re.MULTILINE)
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()


def test_it_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bigmac fit` as a process, which starts another one; commands of one process here, which spares their imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    commands = []
    for kind, title, text in BLOCKS:
        if title:
            (tmp_path / title).write_text(text)
        elif kind == "bash" and "pip install" not in text:
            commands += text.splitlines()
            for command in text.splitlines():
                _run(shlex.split(command), tmp_path, monkeypatch)
    assert [command.split()[:2] for command in commands] == [
        ["python", "draw.py"], *(["bigmac", name] for name in ("data", "plan", "fit", "chat"))
    ]  # fmt: skip
    sys.modules.pop("shapes", None)
    with open(tmp_path / "runs" / "shapes" / "version_0" / "metrics.csv") as file:
        accuracies = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row.get("val/accuracy")]
    assert accuracies[-1] > 0.9
    assert capsys.readouterr().out.splitlines()[-1] == "red"


def _run(command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command[0] == "python" or command[1] == "fit":
        assert run(command, folder).returncode == 0
        return
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
