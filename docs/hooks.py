"""What MkDocs cannot do by itself: where the API reference finds the packages, and texts that stand in other files.

The build reads Python files and imports none of them, so that it needs no torch.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parent.parent

INCLUDE = re.compile(r"^<!-- (?P<file>[\w.]+\.md)(?:: (?P<heading>.+))? -->$", re.MULTILINE)
"""A line that stands for a text outside of docs/: ``<!-- README.md: Start -->`` for a section without its heading, and
``<!-- CHANGELOG.md -->`` for a file without its title."""

LINK = re.compile(r"\[([^]]*)\]\((?!https?://|#)([^)#]+)(#[^)]*)?\)")


@event_priority(100)  # before mkdocstrings looks for the folder
def on_config(config: Any) -> None:
    """Copy the packages to build/api/bigmac_lightning, to where they are after installation (pyproject.toml)."""
    package = ROOT / "build" / "api" / "bigmac_lightning"
    shutil.rmtree(package, ignore_errors=True)
    for source, target in (("bigmac_lightning", ""), ("models", "models"), ("datamodules", "datamodules")):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, package / target, ignore=ignored, dirs_exist_ok=True)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the texts of other files in."""
    return INCLUDE.sub(lambda found: text_of(found["file"], found["heading"]), markdown)


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
