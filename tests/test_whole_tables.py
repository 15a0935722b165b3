"""Tables of commands, in narrow terminals and in pipes: nothing of them is cut."""

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from bigmac_lightning import cli
from bigmac_lightning.whole_tables import print_whole

ROOT = Path(__file__).parents[1]
PATH = "runs/digits/version_0/checkpoints/" + "epoch=12-step=34567-" * 8 + ".ckpt"


WORDS = {
    "plan": ["microbatches", "encoder"],
    "compare": ["interleaved_1f1b", "disaggregated", "bubble %"],
    "plan --config": ["generator", "parameters", "microbatches"],
    "tune --config": ["microbatches", "generators,", "group_size", "computing"],
}


def _printed(width: int, terminal: bool) -> str:
    table = Table(title="done")
    for heading in ("what", "a heading of several words", "number"):
        table.add_column(heading)
    table.add_row("checkpoint", PATH, "0.123456789")
    file = StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, no_color=True)
    print_whole(console, table)
    console.print("as wide as before " * 9)
    return file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [20, 80, 300])
def test_nothing_is_cut(width: int, terminal: bool) -> None:
    printed = re.sub(r"\x1b\[[0-9;]*m", "", _printed(width, terminal))
    assert PATH in printed
    assert "0.123456789" in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines()[-2:])) <= width, "the console is as wide as before"


def test_a_wide_terminal_is_not_filled() -> None:
    widths = {width: max(map(len, _printed(width, False).splitlines()[:-3])) for width in (20, 300)}
    assert widths[20] == widths[300]


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_commands(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers in a pipe of any width."""
    arguments = ["--pipeline_parallel_size", "4", "--microbatches", "64", "--costs.EF", "1234.5678"]
    printed = list[str]()
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.module_of(command, arguments).main(arguments) == 0
        text = re.sub(r"\d+\.\d+ *$|time .*|rank \d+ +[^│\d ].*", "", capsys.readouterr().out, flags=re.MULTILINE)
        printed.append("\n".join(line for line in text.splitlines() if "│" in line or command == "compare"))
    assert "…" not in printed[0]
    assert printed[0].split() == printed[1].split()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser
@pytest.mark.parametrize("command", WORDS)
def test_words_are_whole_in_a_narrow_terminal(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "NO_COLOR": "1", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    name, *config = command.split()
    arguments = [*config, str(ROOT / "configs" / "digits.yaml")] if config else []
    arguments += ["--microbatches=4", *["--ranks=4"] * (name == "tune")] if config else []
    arguments = arguments or ["--pipeline_parallel_size=4", "--microbatches=8"]
    assert cli.module_of(name, arguments).main(arguments) == 0
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in printed
    for word in WORDS[command]:
        assert word in printed
