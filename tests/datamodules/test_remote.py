"""Tars on a server that speaks S3, and in fsspec's memory, give what the same files on disk give."""

import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import PIL.Image
import pytest
import s3fs

from bigmac_lightning.checkpoints.remote import at
from bigmac_lightning.datamodules import (
    CaptionFolder,
    ExampleError,
    LlavaJSON,
    MessagesJSONL,
    TextFiles,
    WebDatasetTars,
    remote,
)
from bigmac_lightning.datamodules.example import Size
from bigmac_lightning.datamodules.sources import text_files
from tests.datamodules.examples import data, said, train_loader, write_jsonl
from tests.datamodules.test_resume import names, pixels

SHARDS, SAMPLES = 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("local")
    for shard in range(SHARDS):
        with tarfile.open(made / f"{shard}.tar", "w") as tar:
            for i in range(SAMPLES):
                number = shard * SAMPLES + i
                PIL.Image.effect_noise((16 + 8 * i, 16 + 8 * shard), 50 + number).convert("RGB").save(made / "a.png")
                (made / "a.txt").write_text("n" * (number + 1))
                for ending in ("png", "txt"):
                    tar.add(made / f"a.{ending}", f"{number:03}.{ending}")
    return made


@pytest.fixture
def s3(server: None, folder: Path) -> Iterator[str]:
    fsspec.filesystem("s3", skip_instance_cache=True).put(f"{folder}/*.tar", "shards/")
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://shards"
    s3fs.S3FileSystem.clear_instance_cache()


def _content(source: WebDatasetTars) -> list[Any]:
    return _content_of(source, len(source))


def _content_of(source: Any, number: int) -> list[Any]:
    """Captions and bytes of images, of the first examples."""
    examples = [source[i] for i in range(number)]
    return [(example.messages[1].parts, [_read(item.file) for item in example.media]) for example in examples]


def _read(file: Any) -> bytes:
    with file.open() as opened:
        return opened.read()


def test_s3_gives_what_the_disk_gives(s3: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = _content(WebDatasetTars(f"{folder}/*.tar"))
    assert len(local) == SHARDS * SAMPLES
    for paths in (f"{s3}/*.tar", f"{s3}/{{0..2}}.tar", s3, f"{s3}/", [f"{s3}/{k}.tar" for k in range(SHARDS)]):
        assert _content(WebDatasetTars(paths, index_dir=tmp_path)) == local, paths
    assert _content(WebDatasetTars(f"{s3}/1.tar", index_dir=tmp_path)) == local[SAMPLES : 2 * SAMPLES]
    monkeypatch.setattr(remote, "WHOLE", 100)  # large members are read in blocks
    assert _content(WebDatasetTars(s3, index_dir=tmp_path)) == local

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a tar was read")

    monkeypatch.setattr(tarfile, "open", refused)
    assert _content(WebDatasetTars(s3, index_dir=tmp_path)) == local, "the index is kept"


def test_batches_of_workers(s3: str, folder: Path, tmp_path: Path) -> None:
    """Forked workers open connections of their own."""

    def batches(paths: str, workers: int) -> list[Any]:
        source = WebDatasetTars(paths, index_dir=tmp_path)
        made = data(
            write_jsonl(tmp_path / "a.jsonl", []), train=[source], val=[], num_workers=workers, token_budget=100
        )
        made.prepare_data()
        return [([len(part) for part in names(batch)], pixels(batch)) for batch in train_loader(made, 1, 0)]

    expected = batches(f"{folder}/*.tar", 0)
    assert len(expected) > 2
    assert batches(f"{s3}/*.tar", 0) == expected
    assert batches(f"{s3}/*.tar", 2) == expected


def test_a_changed_file_has_another_fingerprint(s3: str, folder: Path, tmp_path: Path) -> None:
    first = WebDatasetTars(s3, index_dir=tmp_path).fingerprint()
    assert first == WebDatasetTars(f"{s3}/{{0..2}}.tar", index_dir=tmp_path).fingerprint()
    shutil.copy(folder / "0.tar", tmp_path / "1.tar")
    fsspec.filesystem("s3", skip_instance_cache=True).put(str(tmp_path / "1.tar"), "shards/1.tar")
    s3fs.S3FileSystem.clear_instance_cache()
    second = WebDatasetTars(s3, index_dir=tmp_path)
    assert second.fingerprint() != first
    assert _content(second)[SAMPLES : 2 * SAMPLES] == _content(second)[:SAMPLES]


def test_what_cannot_be_found(s3: str, tmp_path: Path) -> None:
    for paths, wrong in (
        (f"{s3}/*.zip", r"WebDatasetTars: there is no file s3://shards/\*\.zip: correct the path"),
        (f"{s3}/7.tar", "there is no file"),
        ("s3://other/*.tar", "other.*cannot be looked for|there is no file"),
        ([f"{s3}/7.tar"], r"7\.tar cannot be found: FileNotFoundError"),
        ("nothing://a.tar", "nothing://a.tar cannot be looked for: ValueError: Protocol not known"),
    ):
        with pytest.raises(ValueError, match=wrong):
            WebDatasetTars(paths, index_dir=tmp_path)
    with pytest.raises(ValueError, match=r"CaptionFolder: s3://shards is remote: give a list"):
        CaptionFolder(s3)
    with pytest.raises(ValueError, match=r"media_root has s3://shards, which is remote, and others: give one folder"):
        MessagesJSONL(write_jsonl(tmp_path / "a.jsonl", []), media_root=[s3, tmp_path])
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be found: FileNotFoundError"):
        MessagesJSONL(f"{s3}/none.jsonl", index_dir=tmp_path)


@pytest.mark.parametrize("kind", [MessagesJSONL, LlavaJSON])
def test_json_and_its_media(s3: str, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and its images lie on a server, or one of both does. Images are larger than a block, or smaller."""
    monkeypatch.setenv("HOME", str(tmp_path))  # the index is kept there
    local = tmp_path / "data"
    (local / "photos").mkdir(parents=True)
    names_ = []
    for k, side in enumerate((16, 24, 900)):
        PIL.Image.effect_noise((side, side), 90).convert("RGB").save(local / "photos" / f"{k}.png")
        names_.append(f"photos/{k}.png")
    assert (local / names_[-1]).stat().st_size > remote.WHOLE
    records = [{"messages": said("<image>?", "ä" * (k + 1)), "images": [name]} for k, name in enumerate(names_)]
    records += [{"messages": said("<image>?", "no"), "images": ["../../secret.png"]}]
    file = local / "a.json"
    write_jsonl(file, records) if kind is MessagesJSONL else file.write_text(json.dumps(records))
    fsspec.filesystem("s3", skip_instance_cache=True).put(f"{local}/", "shards/data/", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    expected = _content_of(kind(file), 3)
    there, media = f"{s3}/data/a.json", f"{s3}/data"
    for source in (kind(there), kind(there, media_root=media), kind(there, media_root=local), kind(file, media)):
        assert _content_of(source, 3) == expected
        assert pickle.loads(pickle.dumps(source)).identity() == source.identity()
        with pytest.raises(ExampleError, match=r"'\.\./\.\./secret\.png' leads out of the media root"):
            source[3]
    if kind is MessagesJSONL:
        assert len(pickle.dumps(kind(there))) < 1000, "the index is not sent to workers"
        fsspec.filesystem("s3", skip_instance_cache=True).pipe("shards/data/a.json", b"\n" + file.read_bytes())
        s3fs.S3FileSystem.clear_instance_cache()
        assert _content_of(kind(there), 3) == expected, "another file has another index"
    assert kind(there).fingerprint() != kind(file).fingerprint()
    assert kind(there).identity() != kind(file).identity()
    own = data(file, train=[kind(there)], val=[], on_error="skip", token_budget=4000)
    own.prepare_data()
    own.setup("fit")
    [measured] = own._measured["train"]
    assert sorted(measured.errors) == [3]
    assert measured.sizes(2) == [Size(900, 900)]


def test_texts(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files, and texts between separators, also where pieces are read that end within a separator."""
    (tmp_path / "1.txt").write_bytes(b"\xef\xbb\xbf" + "eins ä\n\n\nzwei\n\n \n\n\n\nthree".encode())
    (tmp_path / "2.txt").write_text("\n\n\nfour\n\n")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.put([str(tmp_path / name) for name in ("1.txt", "2.txt")], "shards/")
    s3fs.S3FileSystem.clear_instance_cache()
    for separator in (None, "\n\n"):
        local = TextFiles(f"{tmp_path}/*.txt", separator)
        expected = [_text(local[i]) for i in range(len(local))]
        assert expected == ["eins ä", "\nzwei", "three", "\nfour"] or separator is None
        for piece in (1 << 24, 1, 2, 5):
            monkeypatch.setattr(text_files, "PIECE", piece)
            found = TextFiles(f"{s3}/*.txt", separator, index_dir=tmp_path / str(piece))
            assert [_text(found[i]) for i in range(len(found))] == expected
        assert found.identity() != local.identity()
        assert pickle.loads(pickle.dumps(found)).fingerprint() == found.fingerprint()
    monkeypatch.setattr(text_files, "_spans", lambda *_: pytest.fail("the places of texts are kept"))
    assert len(TextFiles(f"{s3}/*.txt", "\n\n", index_dir=tmp_path / "5")) == 4
    system.pipe("shards/2.txt", b"other")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.undo()
    changed = TextFiles(f"{s3}/*.txt", "\n\n", index_dir=tmp_path / "5")
    assert _text(changed[3]) == "other"


def _text(example: Any) -> str:
    [message] = example.messages
    return "".join(message.parts)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # it is not there
    for make in (WebDatasetTars, MessagesJSONL, TextFiles, LlavaJSON):
        with pytest.raises((ValueError, ImportError), match="its package is missing: pip install gcsfs"):
            make("gs://bucket/a.jsonl")
    with pytest.raises(ImportError, match="gs://bucket/run cannot be reached: its package is missing: pip install gcs"):
        at("gs://bucket/run").exists()


def test_paths_that_lead_out_of_a_remote_folder() -> None:
    folder = remote.Folder("s3://bucket/photos/")
    assert folder.file("a/./b%20.png") == "s3://bucket/photos/a/b%20.png"
    for path in ("../a", "a/../../b", "/a", "..", "a::file:///etc/passwd", "a::file://b"):
        with pytest.raises(ValueError, match="leads out"):
            folder.file(path)
    for path in ("%2e%2e/a", "a?b", "a#b", "..\\a"):
        with pytest.raises(ValueError, match="leads out"):
            remote.Folder("https://server/photos").file(path)
    assert not remote.is_remote("file:///photos"), "links in it are followed, and must stay inside"


def test_memory(folder: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for shard in range(SHARDS):
        system.pipe(f"/data/{shard}.tar", (folder / f"{shard}.tar").read_bytes())
    try:
        for paths in ("memory://data/*.tar", "memory://data", "memory://data/{0..2}.tar"):
            found = WebDatasetTars(paths, index_dir=tmp_path)
            assert _content(found) == _content(WebDatasetTars(f"{folder}/*.tar"))
    finally:
        system.rm("/data", recursive=True)
