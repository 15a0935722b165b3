"""docs/digits.ipynb: its cells train in a Jupyter kernel, whose threads a fork leaves behind, and which can be
stopped."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.blocks import ROOT

pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of jupyter_client
    pytest.mark.filterwarnings("ignore:.*Kernel is running over TCP"),
]


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client with a kernel of this Python, in an empty folder. It trains for one epoch."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix, "share", "jupyter")))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    text = (ROOT / "docs" / "digits.ipynb").read_text().replace("max_epochs=2", "max_epochs=1")
    read = nbformat.reads(text, as_version=4)
    nbformat.validate(read)
    return nbclient.NotebookClient(read, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}})


def _outputs(cell: Any) -> str:
    return "".join(str(output.get("data", "")) for output in cell.outputs)


def test_all_cells_run(notebook: Any, tmp_path: Path) -> None:
    """The session has the whole model after the training: it draws, it answers, and the plan is there."""
    notebook.execute()
    _, trained, asked, looked = [cell for cell in notebook.nb.cells if cell.cell_type == "code"]
    [loss] = re.findall(r"'val/text': ([\d.]+)", _outputs(trained))
    assert float(loss) < 3, "to guess among the 39 tokens costs 3.7"
    assert "image/png" in _outputs(asked)
    assert "<iframe" in _outputs(looked)
    assert (tmp_path / "plan.html").is_file()


@pytest.mark.wide
def test_a_stopped_cell_ends_all_ranks(notebook: Any) -> None:
    """... and the next one trains as usual."""
    imports, trains = [cell for cell in notebook.nb.cells if cell.cell_type == "code"][:2]
    short = trains.source
    with notebook.setup_kernel():
        notebook.execute_cell(imports, 0)
        trains.source = (
            "import os, signal, threading\n"
            "threading.Timer(6, os.killpg, (0, signal.SIGINT)).start()\n"  # as Jupyter does
            f"{short.replace('max_epochs=1', 'max_epochs=1000')}"
        )
        with pytest.raises(nbclient.exceptions.CellExecutionError, match="SystemExit"):
            notebook.execute_cell(trains, 1)
        wait = "from multiprocessing import active_children\nfor child in active_children():\n    child.join(20)\n"
        trains.source = f"{wait}assert not active_children()\n{short}"
        notebook.execute_cell(trains, 1)
    assert "val/text" in _outputs(trains)
