"""The built pages in a browser, as wide as a phone and as a screen: nothing is broken, and the timeline reacts."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from tests.blocks import ROOT
from tests.schedule.pages import BROWSER

pytest.importorskip("material", reason="make docs installs what builds the pages")
pytest.importorskip("mkdocstrings")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium")

CHECK = """
<!DOCTYPE html><html><body><script type="module">
const seen = { pages: {} };
window.onunhandledrejection = (event) => fetch("seen", { method: "POST", body: JSON.stringify(String(event.reason)) });
const frame = document.body.appendChild(document.createElement("iframe"));
frame.style.height = "800px";
const open = (url) => new Promise((done) => { frame.onload = done; frame.src = url; });
for (const place of PAGES) for (const width of [390, 1300]) {
  frame.style.width = `${width}px`;
  await open(place);
  const page = frame.contentDocument, root = page.documentElement;
  for (const image of page.images) { image.loading = "eager"; await image.decode().catch(() => {}); }
  seen.pages[`${place} ${width}`] = {
    broken: [...page.images].filter((image) => !image.naturalWidth).map((image) => image.src),
    over: root.scrollWidth - root.clientWidth,
    title: page.querySelector("h1") && page.querySelector("h1").textContent,
  };
}
await open("how_it_works/");
const inner = frame.contentDocument.querySelector("iframe.timeline");
inner.loading = "eager";
const pause = (ms) => new Promise((go) => setTimeout(go, ms));
while (!inner.contentDocument || !inner.contentDocument.documentElement.dataset.total) await pause(50);
const timeline = inner.contentDocument, root = timeline.documentElement;
const chart = timeline.getElementById("chart"), box = timeline.getElementById("canvas").getBoundingClientRect();
chart.setPointerCapture = () => {};  // as this pointer does not exist
const first = { clientX: box.left + 65, clientY: box.top + 37, bubbles: true, pointerId: 1, button: 0 };
for (const type of ["pointerdown", "pointerup"]) chart.dispatchEvent(new inner.contentWindow.PointerEvent(type, first));
seen.clicked = root.dataset.selected;
chart.dispatchEvent(new inner.contentWindow.KeyboardEvent("keydown", { key: "ArrowRight", shiftKey: true }));
seen.stepped = root.dataset.selected;
seen.error = root.dataset.error || "";
seen.hidden = [];
for (const width of [390, 1300]) {
  frame.style.width = `${width}px`;
  await pause(300);
  seen.hidden.push(root.scrollHeight - inner.clientHeight);
}
frame.contentDocument.body.dataset.mdColorScheme = "slate";  // what the switch for dark colours does
await pause(300);
seen.dark = inner.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches;
await fetch("seen", { method: "POST", body: JSON.stringify(seen) });
</script></body></html>
"""


class _Handler(SimpleHTTPRequestHandler):
    """Serves the site, and takes what the script has seen."""

    def do_POST(self) -> None:
        self.server.seen.put(self.rfile.read(int(self.headers["Content-Length"])))  # pyright: ignore
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the script above has found on each page, and on the timeline; and what the browser's console said."""
    folder = tmp_path_factory.mktemp("site")
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder / "site")]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    site = folder / "site"
    pages = [str(page.parent.relative_to(site)) + "/" for page in site.rglob("index.html")]
    (site / "check.html").write_text(CHECK.replace("PAGES", json.dumps(pages)))
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(site)))
    server.seen = Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--window-size=1400,900",
    ]
    options += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command = [str(BROWSER), *options, "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/check.html"]
    with open(folder / "log", "w+") as log:
        browser = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            found = server.seen.get(timeout=120)
        except Empty:
            pytest.fail((folder / "log").read_text()[-3000:])
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
            server.server_close()
    console = [line for line in (folder / "log").read_text().splitlines() if "CONSOLE" in line]
    found = json.loads(found)
    assert isinstance(found, dict), found
    return {**found, "console": console}


def test_no_page_is_broken(seen: Any) -> None:
    assert len(seen["pages"]) > 50
    broken = {
        name: page for name, page in seen["pages"].items() if page["broken"] or page["over"] > 0 or not page["title"]
    }
    assert not broken
    assert not seen["console"]


def test_the_timeline_reacts(seen: Any) -> None:
    """To a click, and to a key that steps to the next action."""
    assert seen["error"] == ""
    assert seen["clicked"].startswith(
        "EF0 on rank 0; encoder forward of group 0 (microbatches 0); first_stage: start 0, "
    )
    assert seen["stepped"].startswith("0F0 on rank 0; forward of stage 0, microbatch 0; first_stage: start 1, ")
    assert max(seen["hidden"]) <= 0, "all of it is visible without a scroll bar of its own"
    assert seen["dark"], "it has the colours of the page around it"
