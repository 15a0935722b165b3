"""What is in a page of timelines: its data, and what a browser makes of it."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Scripts(HTMLParser):
    """Collects the scripts of a page, and the attributes of its root."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root: dict[str, Any] = {}
        self.scripts: list[str] = []
        self.links: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag == "html":
            self.root = dict(attrs)
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def data_of(path: Path) -> Any:
    """The data of a page, which has one more script and refers to nothing else."""
    page = _Scripts(path.read_text())
    assert len(page.scripts) == 2
    assert page.links == []
    return json.loads(page.scripts[0])


def opened(path: Path, fragment: str = "", then: str = "") -> dict[str, Any]:
    """The attributes of the page's root after a browser has run its script, and then this one."""
    assert BROWSER is not None
    if then:
        path.write_text(path.read_text().replace("</body>", f"<script>{then}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--virtual-time-budget=2000"]
    options.append(f"--user-data-dir={path.parent / 'profile'}")
    command = [BROWSER, *options, "--dump-dom", f"{path.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    root = _Scripts(done.stdout).root
    assert "data-error" not in root, root["data-error"]
    assert "data-total" in root, f"the script has not come to its end: {done.stderr}"
    return root
