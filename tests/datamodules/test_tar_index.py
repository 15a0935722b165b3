"""The index of tar files: made once, kept, mapped by every process."""

import io
import json
import logging
import multiprocessing
import pickle
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmac_lightning.datamodules import WebDatasetTars
from bigmac_lightning.datamodules.kept_arrays import keep, mapped
from bigmac_lightning.datamodules.sources import tar_index
from bigmac_lightning.datamodules.sources.tar_index import TarIndex


def _tar(path: Path, members: dict[str, bytes | str]) -> str:
    """A tar with these members; a text is the member that one links to."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def _shards(folder: Path) -> list[str]:
    draw, paths = random.Random(0), list[str]()
    for shard in range(4):
        members: dict[str, bytes | str] = {}
        for i in range(draw.choice([0, 3, 8])):
            for suffix in draw.sample(["jpg", "txt", "seg.png", "json"], draw.randint(1, 3)):
                members[f"{draw.choice(['a', 'b/ä', ''])}/{i:03}.{suffix}".lstrip("/")] = draw.randbytes(
                    draw.randint(0, 700)
                )
        if shard == 2:
            members |= {"x.jpg": "y/z.jpg", "y/z.jpg": b"picture", "v.jpg": "nowhere.jpg"}
        paths.append(_tar(folder / f"{shard}.tar", members))
    return paths


def _listed(paths: list[str]) -> list[Any]:
    """What an index has, as read from each tar by itself: contents instead of places."""
    found: list[Any] = []
    for path in paths:
        samples: dict[str, list[Any]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                try:
                    file = tar.extractfile(member)
                except KeyError:
                    file = None
                content = None if file is None else file.read()
                samples.setdefault(f"{folder}/{stem}" if folder else stem, []).append((f".{suffix}", content))
        found += [(path, key, sorted(own)) for key, own in samples.items()]
    return found


def _contents(index: TarIndex) -> list[Any]:
    found = []
    for path, key, members in (index[i] for i in range(len(index))):
        whole = Path(path).read_bytes()
        own = [(suffix, None if offset < 0 else whole[offset : offset + length]) for suffix, offset, length in members]
        found.append((path, key, own))
    return found


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices of all tars are kept, however small."""
    monkeypatch.setattr(tar_index, "LARGE", 0)


def _no_scanning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a tar was read")

    monkeypatch.setattr(tarfile, "open", refused)


def test_every_sample(tmp_path: Path) -> None:
    paths = _shards(tmp_path)
    index = TarIndex.of(paths, tmp_path / "cache")
    assert len(index) == len(_listed(paths)) > 10
    assert _contents(index) == _listed(paths)
    assert not (tmp_path / "cache").exists(), "small tars are read sooner than an index is found"
    for wrong in (-1, len(index)):
        with pytest.raises(IndexError):
            index[wrong]


@pytest.mark.usefixtures("kept")
def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, cache = _shards(tmp_path), tmp_path / "cache"
    first = TarIndex.of(paths, cache)
    expected = _listed(paths)
    sent = pickle.dumps(first)
    with monkeypatch.context() as patch:
        _no_scanning(patch)
        for index in (first, TarIndex.of(paths, cache), pickle.loads(sent)):
            assert _contents(index) == expected
    assert len(sent) < 600, "its arrays are not sent to workers"
    with tarfile.open(paths[0], "w") as tar:
        tar.addfile(tarfile.TarInfo("new.txt"))
    assert ("new", [(".txt", b"")]) in [entry[1:] for entry in _contents(TarIndex.of(paths, cache))]


@pytest.mark.usefixtures("kept")
def test_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    paths, cache = _shards(tmp_path), tmp_path / "cache"
    TarIndex.of(paths, cache)
    for content in (b"", b"{", b"\0" * 100):
        [file] = cache.glob("tars-*.safetensors")
        file.write_bytes(content)
        assert _contents(TarIndex.of(paths, cache)) == _listed(paths)
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".safetensors"], "no parts are left"


def test_pages_of_kept_arrays_are_shared(tmp_path: Path) -> None:
    """They are not in the own memory of a process, and it may not change what others read."""
    keep(tmp_path / "a", {"many": np.arange(20_000_000), "none": np.zeros((0, 3))})
    process = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "a")], check=True, capture_output=True, text=True
    )
    assert process.stdout.split() == ["199999990000000", "(0,", "3)", "True"]
    assert mapped(tmp_path / "a", ["many", "none"])["many"][3] == 3


READ = """
import sys
from pathlib import Path
from bigmac_lightning.datamodules.kept_arrays import mapped

def own() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

before = own()
found = mapped(Path(sys.argv[1]), ["many", "none"])
print(found["many"].sum(), found["none"].shape, own() - before < 5e6)
found["many"][3] = 0
"""


@pytest.mark.usefixtures("kept")
def test_it_cannot_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = _shards(tmp_path)
    (tmp_path / "cache").write_text("")
    with caplog.at_level(logging.WARNING):
        assert _contents(TarIndex.of(paths, tmp_path / "cache")) == _listed(paths)
    assert "are not kept" in caplog.text


def _open_at_once(paths: list[str], cache: Path, notes: Path) -> None:
    scanned = TarIndex.scanned

    def noted(*arguments: Any, **options: Any) -> TarIndex:
        with notes.open("a") as file:
            file.write("scanned\n")
        time.sleep(0.3)
        return scanned(*arguments, **options)

    TarIndex.scanned = noted  # pyright: ignore[reportAttributeAccessIssue]
    assert _contents(TarIndex.of(paths, cache)) == _listed(paths)


@pytest.mark.usefixtures("kept")
def test_several_processes_make_one(tmp_path: Path) -> None:
    paths, arguments = _shards(tmp_path), (tmp_path / "cache", tmp_path / "notes")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_open_at_once, args=(paths, *arguments)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "notes").read_text() == "scanned\n"


@pytest.mark.usefixtures("kept")
def test_a_source_with_a_kept_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the same examples, and measurements of one are those of the other."""
    record = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    path = _tar(tmp_path / "a.tar", {f"{i}.json": record.encode() for i in range(5)})
    first = WebDatasetTars(path, index_dir=tmp_path / "cache")
    _no_scanning(monkeypatch)
    second = WebDatasetTars(path, index_dir=tmp_path / "cache")
    assert [second[i] for i in range(5)] == [first[i] for i in range(5)]
    assert second.identity() == first.identity() == pickle.loads(pickle.dumps(first)).identity()
    assert second.identity() != WebDatasetTars(path, ignore=["cls"], index_dir=tmp_path / "cache").identity()
