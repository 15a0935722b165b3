"""What MkDocs cannot do by itself: where the API reference finds the packages, texts of other files, cells of
notebooks, and timelines.

The build reads Python files; it imports the schedules alone, which are pure Python, so that it needs no torch.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import cut  # noqa: E402

from bigmac_lightning.schedule.costs import Costs  # noqa: E402
from bigmac_lightning.schedule.make import make_plan  # noqa: E402
from bigmac_lightning.schedule.request import PlanRequest  # noqa: E402
from bigmac_lightning.schedule.verify import verify  # noqa: E402
from bigmac_lightning.schedule.viewer.page import planned_track, write_page  # noqa: E402

TIMELINES = "timelines.html"
POLICIES = ("first_stage", "nested", "filled")

INCLUDE = re.compile(r"^<!-- (?P<file>[\w.]+\.md)(?:: (?P<heading>.+))? -->$", re.MULTILINE)
"""A line that stands for a text outside of docs/: ``<!-- README.md: Start -->`` for a section without its heading, and
``<!-- CHANGELOG.md -->`` for a file without its title."""

NOTEBOOK = re.compile(r"^<!-- (\w+\.ipynb) -->$", re.MULTILINE)
"""A line that stands for the cells of a notebook in docs/, without its title."""

LINK = re.compile(r"\[([^]]*)\]\((?!https?://|#)([^)#]+)(#[^)]*)?\)")


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config: Any) -> None:
    """Copy the packages to build/api/bigmac_lightning, to where they are after installation (pyproject.toml)."""
    package = ROOT / "build" / "api" / "bigmac_lightning"
    shutil.rmtree(package, ignore_errors=True)
    for source, target in (("bigmac_lightning", ""), ("models", "models"), ("datamodules", "datamodules")):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, package / target, ignore=ignored, dirs_exist_ok=True)


def on_files(files: Any, config: Any) -> None:
    """Add the page of timelines."""
    files.append(File.generated(config, TIMELINES, content=timelines()))


def timelines() -> str:
    """A page on which the same step is planned by several policies, with what is alive of the encoder's activations."""
    tracks = []
    for policy in POLICIES:
        costs = Costs(F=1, B=2, EF=1, EB=2, G=3)
        plan = make_plan(PlanRequest(policy=policy, pipeline_parallel_size=4, microbatches=8, costs=costs))
        track = planned_track(plan, verify(plan), name=policy)
        tracks.append(replace(track, curves={"encoder units": track.curves["encoder units"]}))
    with TemporaryDirectory() as folder:
        write_page(path := Path(folder, TIMELINES), "One step by three policies", tracks)
        return path.read_text()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the texts of other files in, cells of notebooks, and the picture of a cut."""
    markdown = markdown.replace("<!-- cut -->", cut.picture())
    markdown = NOTEBOOK.sub(lambda found: cells_of(ROOT / "docs" / found[1]), markdown)
    return INCLUDE.sub(lambda found: text_of(found["file"], found["heading"]), markdown)


def cells_of(notebook: Path) -> str:
    """The texts and the code of a notebook, without the line of its title."""
    cells = json.loads(notebook.read_text())["cells"]
    parts = ["".join(cell["source"]) for cell in cells]
    code = [cell["cell_type"] == "code" for cell in cells]
    parts = [f"```python\n{part}\n```" if is_code else part for part, is_code in zip(parts, code, strict=True)]
    return "\n\n".join(parts).partition("\n")[2]


def text_of(file: str, heading: str | None) -> str:
    """A text of the repository's root, whose links lead to pages of docs/. Other files are named without a link.

    Raises:
        ValueError: the file has no such section.
    """
    text = (ROOT / file).read_text()
    if heading is None:
        return LINK.sub(_link, text.partition("\n")[2])
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{file} has no section {heading!r}")
    return LINK.sub(_link, found[1])


def _link(found: re.Match[str]) -> str:
    name, place, anchor = found.groups()
    page = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}.get(place, place.removeprefix("docs/"))
    if (ROOT / "docs" / page).is_file():
        title = (ROOT / "docs" / page).read_text().partition("\n")[0].removeprefix("# ")
        return f"[{title if name.endswith('.md') else name}]({page}{anchor or ''})"
    return f"{name} (`{place}`)"
