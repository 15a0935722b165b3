"""A data set by ``hf://`` addresses: a small server answers what `HfFileSystem` asks of the Hugging Face Hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

REPOSITORY, COMMIT = "owner/name", "0" * 40


class _Hub(BaseHTTPRequestHandler):
    """Answers for one repository, whose files lie in a folder: what is in its folders, and parts of files."""

    folder: Path

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        tree, files = f"/api/datasets/{REPOSITORY}/tree/main", f"/datasets/{REPOSITORY}/resolve/main/"
        if path == f"/api/datasets/{REPOSITORY}":
            self._answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(tree) and (place := self.folder / path.removeprefix(tree).strip("/")).is_dir():
            self._answer(json.dumps([self._entry(file) for file in sorted(place.iterdir())]).encode())
        elif path.startswith(files) and (place := self.folder / path.removeprefix(files)).is_file():
            self._part(place.read_bytes())
        else:
            self._answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    def _entry(self, file: Path) -> dict[str, object]:
        path = str(file.relative_to(self.folder))
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": COMMIT}
        oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
        return {"type": "file", "path": path, "size": file.stat().st_size, "oid": oid}

    def _part(self, content: bytes) -> None:
        if not (asked := self.headers.get("Range")):
            return self._answer(content)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        told = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}
        return self._answer(part, 206, told)

    def _answer(self, content: bytes, status: int = 200, told: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(told or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub with the files in the folder "repository"."""
    folder = tmp_path / "repository"
    (folder / "images").mkdir(parents=True)
    with (folder / "data.jsonl").open("w") as lines:
        for i in range(4):
            Image.new("RGB", (28 + 4 * i, 28), (i, 0, 0)).save(folder / "images" / f"{i}.png")
            said = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": f"I am {i}."}]
            lines.write(json.dumps({"messages": said, "images": [f"{i}.png"]}) + "\n")
    handler = type("Handler", (_Hub,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


USE = """
import sys
import torch
from bigmac_lightning.datamodules import LoadingOptions, MessagesJSONL, MultimodalDataModule, PatchProcessor

def batches(place):
    source = MessagesJSONL(f"{place}/data.jsonl", media_root=f"{place}/images", index_dir="kept")
    visual, loading = PatchProcessor(patch_size=4, max_rows=64), LoadingOptions(cache_dir="kept")
    options = {"token_budget": 256, "microbatches": 2, "loading": loading}
    data = MultimodalDataModule([source], processor="bytes", visual=visual, **options)
    data.setup("fit")
    found = [m for batch in data.train_dataloader() for m in batch.microbatches]
    return [m.inputs["input_ids"] for m in found], [item.data for m in found for item in m.media]

tokens, media = batches("hf://datasets/owner/name")
expected, pictures = batches("repository")
assert len(media) == len(pictures) == 4
assert all(torch.equal(a, b) for a, b in zip(tokens + media, expected + pictures, strict=True))
try:
    MessagesJSONL("hf://datasets/owner/name/none.jsonl", index_dir="kept")
except ValueError as error:
    print(error)
"""


def test_a_data_set_on_the_hub(hub: str, tmp_path: Path) -> None:
    """It gives the batches that the same files give on a disk."""
    given = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}  # which are read at the import
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE], cwd=tmp_path, env=given, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "hf://datasets/owner/name/none.jsonl" in process.stdout
    assert "cannot be found" in process.stdout
