"""Only files below the media roots are read, after links have been followed; and no pipes, folders or devices."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from jsonargparse import ArgumentParser

from bigmac_lightning.datamodules import (
    CaptionFolder,
    ExampleError,
    File,
    HFDataset,
    HFStream,
    Image,
    LlavaJSON,
    MessagesJSONL,
    Source,
    WebDatasetTars,
)
from bigmac_lightning.datamodules.media.decoding import measure
from tests.datamodules.examples import said, write_jsonl


def picture(path: Path, width: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (width, 7)).save(path, "PNG")
    return path


def records(*paths: str) -> list[Any]:
    return [{"messages": said("<image>", "x"), "images": [path]} for path in paths]


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """As the hub's cache has a dataset: a snapshot whose files are links to blobs."""
    picture(tmp_path / "blobs" / "7a5e")
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    (folder / "cat.png").symlink_to("../../blobs/7a5e")
    write_jsonl(folder / "data.jsonl", records("cat.png"))
    (folder / "data.json").write_text(json.dumps([{"image": "cat.png", "conversations": said("<image>", "x")}]))
    return folder


def sources(snapshot: Path, *media_root: Any) -> list[Source]:
    return [MessagesJSONL(snapshot / "data.jsonl", *media_root), LlavaJSON(snapshot / "data.json", *media_root)]


def test_links_out_of_the_root_are_refused_with_what_to_add(snapshot: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    for source in (*sources(snapshot), *sources(snapshot, snapshot), *sources(snapshot, [str(snapshot)])):
        with pytest.raises(ExampleError) as caught:
            source[0]
        assert (
            f"'cat.png' leads out of the media root: it is {blobs}/7a5e, and only files below {snapshot} are read. If "
            f"it is meant, give media_root as a list, with {blobs} after {snapshot}" in str(caught.value)
        )


def test_links_into_another_root_are_followed(snapshot: Path) -> None:
    blobs = snapshot.parent.parent / "blobs"
    for source in (*sources(snapshot, [snapshot, blobs]), *sources(snapshot, (str(snapshot), str(blobs)))):
        (image,) = source[0].media
        assert image.file.name == str(snapshot / "cat.png")
        assert measure(image).width == 9
    for source in sources(snapshot, [blobs, snapshot]):  # paths are relative to the first
        with pytest.raises(ExampleError, match=r"blobs/cat\.png cannot be read: FileNotFoundError"):
            measure(source[0].media[0])
    one, other = sources(snapshot, snapshot)[0], sources(snapshot, [snapshot, blobs])[0]
    assert one.identity() != other.identity()


def test_a_linked_root(tmp_path: Path) -> None:
    picture(tmp_path / "disk" / "photos" / "1.png")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    path = write_jsonl(tmp_path / "d.jsonl", records("photos/1.png", "../d.jsonl"))
    source = MessagesJSONL(path, tmp_path / "data")
    assert measure(source[0].media[0]).width == 9
    with pytest.raises(ExampleError, match="leads out of the media root"):
        source[1]


def test_neighbours_of_a_root_are_not_in_it(tmp_path: Path) -> None:
    picture(tmp_path / "photos-private" / "1.png")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ExampleError, match="leads out of the media root"):
        File.at("../photos-private/1.png", tmp_path / "photos")
    with pytest.raises(ValueError, match="media_root is an empty list"):
        MessagesJSONL(write_jsonl(tmp_path / "d.jsonl", []), [])


def test_a_link_is_read_where_it_led_when_it_was_checked(tmp_path: Path) -> None:
    for name, width in (("in/1.png", 9), ("out/2.png", 4)):
        picture(tmp_path / name, width)
    link = tmp_path / "in" / "link.png"
    link.symlink_to("1.png")
    file = File.at("link.png", tmp_path / "in")
    link.unlink()
    link.symlink_to("../out/2.png")
    assert measure(Image(file)).width == 9


@pytest.mark.parametrize("kind", [HFDataset, HFStream])
def test_rows_that_name_files(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    picture(tmp_path / "blobs" / "1")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").symlink_to("../blobs/1")
    rows = {"messages": [said("<image>?", "one")], "images": [["1.png"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")

    def image(roots: Any) -> Any:
        source = kind("parquet", str(tmp_path / "rows.parquet"), media_root=roots)
        example = source[0] if kind is HFDataset else next(source.read(0))[0]
        if isinstance(example, ExampleError):
            raise example
        return example.media[0]

    assert measure(image([tmp_path / "photos", tmp_path / "blobs"])).width == 9
    with pytest.raises(ExampleError, match=r"leads out of the media root: it is .*blobs/1, and only"):
        measure(image(tmp_path / "photos"))


def test_a_folder_of_captions_with_linked_folders(tmp_path: Path) -> None:
    picture(tmp_path / "disk" / "a" / "1.png")
    picture(tmp_path / "photos" / "2.png")
    for name in ("disk/a/1.txt", "photos/2.txt"):
        (tmp_path / name).write_text("a caption")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "disk" / "a")
    (tmp_path / "disk" / "a" / "back").symlink_to(tmp_path / "photos")  # round and round
    allowed = CaptionFolder([tmp_path / "photos", tmp_path / "disk"])
    assert allowed.files == ["2.png", "linked/1.png"]
    assert [measure(allowed[i].media[0]).width for i in range(2)] == [9, 9]
    alone = CaptionFolder(tmp_path / "photos")
    assert alone.files == ["2.png", "linked"]  # what is in there is not looked at
    with pytest.raises(ExampleError, match=r"'linked' leads out of the media root"):
        alone[1]


def test_captions_out_of_the_root_and_pictures_that_lead_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    picture(folder / "1.png")
    (folder / "2.png").symlink_to("gone.png")
    (tmp_path / "secret").write_text("a secret")
    (folder / "1.txt").symlink_to("../secret")
    (folder / "2.txt").write_text("a caption")
    source = CaptionFolder(folder)
    assert source.fingerprint()
    with pytest.raises(ExampleError, match=r"'1\.txt' leads out of the media root: it is .*/secret"):
        source[0]
    with pytest.raises(ExampleError, match=r"2\.png cannot be read: FileNotFoundError"):
        measure(source[1].media[0])
    assert CaptionFolder([folder, tmp_path])[0].messages[1].parts == ["a secret"]


def link(tar: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


@pytest.mark.parametrize("prefix", ["", "./"])
def test_links_in_a_tar(prefix: str, tmp_path: Path) -> None:
    """As tar writes files that have two names, and links: each sample has its picture, or is refused."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(picture(tmp_path / "cat.png"), f"{prefix}a/0.png")
        link(tar, f"{prefix}a/1.png", f"{prefix}a/0.png", tarfile.LNKTYPE)
        link(tar, f"{prefix}a/2.png", "../b/x.png", tarfile.SYMTYPE)
        link(tar, f"{prefix}b/x.png", "../a/1.png", tarfile.SYMTYPE)
        link(tar, f"{prefix}a/3.png", "/etc/passwd", tarfile.SYMTYPE)
        link(tar, f"{prefix}a/4.png", "4.png", tarfile.SYMTYPE)
        link(tar, f"{prefix}a/5.png", "", tarfile.FIFOTYPE)
        for i in range(6):
            (tmp_path / "text").write_text(f"number {i}")
            tar.add(tmp_path / "text", f"{prefix}a/{i}.txt")
    source = WebDatasetTars(str(tmp_path / "a.tar"))
    names = [source._index[i][1] for i in range(len(source))]
    assert [name.removeprefix("./") for name in names] == ["a/0", "a/1", "a/2", "b/x", "a/3", "a/4", "a/5"]
    for i in range(3):
        (image,) = source[i].media
        assert measure(image).width == 9
        assert source[i].messages[1].parts == [f"number {i}"]
    for i in (4, 5, 6):
        with pytest.raises(ExampleError, match=r"a/\d\) has \.png that is no file, and no link to one of this tar"):
            source[i]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"images": [{"path": "a.png", "height": 7}]},
            r"has \{'height': 7\} for the image 'a\.png': only its \"path\"",
        ),
        ({"images": [{"path": "a.png", "height": "7", "width": "9"}]}, ".*two integers can be given"),
        ({"images": [{"path": "a.png", "crop": [0, 0, 1, 1]}]}, "has {'crop': .*} for the image"),
        ({"images": [{"url": "a.png"}]}, "has {'url': 'a.png'} for the image None"),
        ({"images": [7]}, "names a file by 7: give its path below"),
        ({"videos": [{"path": "a.mp4", "fps": 2}]}, r"has {'fps': 2} for the video 'a\.mp4': only its \"path\" can"),
    ],
)
def test_keys_of_a_file_are_used_or_refused(given: Any, reason: str, tmp_path: Path) -> None:
    kind = "<image>" if "images" in given else "<video>"
    source = MessagesJSONL(write_jsonl(tmp_path / "d.jsonl", [{"messages": said(kind, "x"), **given}]))
    with pytest.raises(ExampleError, match=rf"\(line 1\) {reason}"):
        source[0]


@pytest.mark.parametrize("given", ["photos", ["photos", "blobs"]])
def test_in_yaml(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "blobs"):
        (tmp_path / folder).mkdir()
    parser = ArgumentParser()
    parser.add_subclass_arguments(Source, "source")
    path = write_jsonl(tmp_path / "d.jsonl", [])
    config = {"class_path": f"{MessagesJSONL.__module__}.MessagesJSONL", "init_args": {"path": str(path)}}
    config["init_args"]["media_root"] = given
    made = parser.instantiate(parser.parse_object({"source": config})).source
    assert [str(root) for root in made.media_roots] == ([given] if isinstance(given, str) else given)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "missing"])
def test_paths_that_are_no_files(kind: str, tmp_path: Path) -> None:
    """A pipe, above all, that would be waited for."""
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    reason = {"loop": "OSError: Too many levels", "missing": "FileNotFoundError: No such file"}
    with pytest.raises(ExampleError, match=rf"a\.png cannot be read: {reason.get(kind, 'it is a folder, a pipe')}"):
        measure(Image(File.at(path)))


def test_links_in_a_circle_below_a_root(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    source = MessagesJSONL(write_jsonl(tmp_path / "d.jsonl", records("a.png")))
    with pytest.raises(ExampleError, match=r"\(line 1\) 'a\.png' leads nowhere: .*loop|cannot be read: OSError"):
        measure(source[0].media[0])
