"""Each format: what becomes of its records, without a media file being opened."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from bigmac_lightning.datamodules import (
    CaptionFolder,
    Example,
    ExampleError,
    HFDataset,
    HFStream,
    Image,
    LlavaJSON,
    MessagesJSONL,
    Video,
    WebDatasetTars,
)
from tests.datamodules.examples import said, write_jsonl


def png(color: int = 0) -> bytes:
    made = io.BytesIO()
    PIL.Image.new("RGB", (9, 7), (color, 0, 0)).save(made, "PNG")
    return made.getvalue()


def told(example: Example) -> list[tuple[str, list[str]]]:
    """Roles and parts, media by the last part of their names."""
    names = {Image: "image", Video: "video"}

    def text(part: Any) -> str:
        return part if isinstance(part, str) else f"{names[type(part)]}:{part.file.name.split('/')[-1]}"

    return [(message.role, [text(part) for part in message.parts]) for message in example.messages]


def test_messages_jsonl(tmp_path: Path) -> None:
    records = [
        {"messages": said("a <image> b <video>", "c"), "images": ["1.png"], "videos": ["v.mp4"]},
        {"messages": [{"role": "system", "content": "be brief"}, *said("<image><image>", "two")],
         "images": [{"path": "sub/2.png", "height": 7, "width": 9}, "3.png"]},
        {"messages": said("draw", "ok"), "target": "4.png"},
    ]  # fmt: skip
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records), "utf-8")
    source = MessagesJSONL(path)
    assert len(source) == 3
    assert told(source[0]) == [("user", ["a ", "image:1.png", " b ", "video:v.mp4"]), ("assistant", ["c"])]
    assert told(source[1])[1] == ("user", ["image:2.png", "image:3.png"])
    first, second = source[1].media
    assert first.size is not None
    assert (first.size.height, first.size.width) == (7, 9)
    assert second.size is None
    assert source[2].target is not None
    assert source[2].target.file.name == str(tmp_path / "4.png")
    assert source[1].name == "line 4"
    other = source.fingerprint()
    path.write_text(path.read_text() + "\n")
    assert MessagesJSONL(path).fingerprint() != other


def test_a_media_root_is_not_left(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").write_bytes(png())
    names = ["in.png", "x/../in.png", str(root / "in.png"), "../secret.png", str(tmp_path / "secret.png"), "link.png"]
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": said("<image>", "x"), "images": [n]} for n in names])
    source = MessagesJSONL(path, root)
    for i in range(3):
        assert source[i].media
    for i in range(3, 6):
        with pytest.raises(ExampleError, match="leads out of the media root"):
            source[i]


def test_llava_json(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    path = tmp_path / "llava.json"
    path.write_text(
        json.dumps([{"id": "7", "image": "cats/1.png", "conversations": turns}, {"conversations": turns[1:]}])
    )
    source = LlavaJSON(path)
    assert told(source[0]) == [("user", ["image:1.png", "\nWhat?"]), ("assistant", ["A cat."])]
    assert source[0].name == "7"
    assert told(source[1]) == [("assistant", ["A cat."])]
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a JSON list"):
        LlavaJSON(path)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_webdataset_tars(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            add(tar, "a/000.png", png(shard))
            add(tar, "a/000.txt", f"caption {shard}".encode())
            add(tar, "a/001.json", json.dumps({"messages": said("<image> or <image>", "no")}).encode())
            add(tar, "a/001.1.png", png(5))
            add(tar, "a/001.0.png", png(6))
            add(tar, "a/002.png", png())
    source = WebDatasetTars(str(tmp_path / "*.tar"), prompt="Describe.")
    assert len(source) == 6
    assert told(source[3]) == [("user", ["image:000.png", "Describe."]), ("assistant", ["caption 1"])]
    assert told(source[1])[0] == ("user", ["image:001.0.png", " or ", "image:001.1.png"])
    for i, color in ((0, 0), (3, 1), (1, 6)):
        with source[i].media[0].file.open() as stream:
            assert stream.read() == png(color)
    with pytest.raises(ExampleError, match=r"000|002.* neither a conversation nor a caption"):
        source[2]
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        add(tar, "a.txt", b"x")
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        WebDatasetTars(str(tmp_path / "z.tar"))
    with pytest.raises(ValueError, match="no such tar files"):
        WebDatasetTars(str(tmp_path / "*.zip"))


def test_caption_folder(tmp_path: Path) -> None:
    for name in ("b/2", "1", "lonely"):
        (tmp_path / f"{name}.png").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png())
    (tmp_path / "1.txt").write_text("one\n")
    (tmp_path / "b" / "2.txt").write_text("two")
    describe = CaptionFolder(tmp_path, "What?")
    assert [told(describe[i]) for i in range(len(describe))] == [
        [("user", ["image:1.png", "What?"]), ("assistant", ["one"])],
        [("user", ["image:2.png", "What?"]), ("assistant", ["two"])],
    ]
    draw = CaptionFolder(tmp_path, "draw {}!", task="draw")
    assert told(draw[1]) == [("user", ["draw two!"])]
    assert draw[1].target is not None
    assert draw[1].target.file.name.endswith("b/2.png")
    with pytest.raises(ValueError, match="has no images with a"):
        CaptionFolder(tmp_path / "nowhere")


@pytest.mark.parametrize("typed", [True, False])
def test_rows_of_the_datasets_library(typed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet with the images' bytes inside, with and without the library's own type for images."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    rows: dict[str, Any] = {
        "messages": [said("<image>?", "one"), said("hello", "there"), said("<image><image>", "two")],
        "images": [
            [{"bytes": png(1), "path": None}],
            [],
            [{"bytes": png(2), "path": None}, {"bytes": png(3), "path": None}],
        ],
    }
    made = datasets.Dataset.from_dict(rows)
    if typed:
        made = made.cast_column("images", datasets.List(datasets.Image()))
    made.to_parquet(tmp_path / "rows.parquet")
    source = HFDataset("parquet", str(tmp_path / "rows.parquet"))
    assert len(source) == 3
    assert [len(source[i].media) for i in range(3)] == [1, 0, 2]
    with source[2].media[1].file.open() as stream:
        assert stream.read() == png(3)
    assert source.fingerprint() == HFDataset("parquet", str(tmp_path / "rows.parquet")).fingerprint()


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def called(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call], "loss": False},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "assistant", "content": "y"},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_tools_in_columns(stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Arrow gives each message the keys of all."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    def read(messages: list[Any], **columns: Any) -> Example:
        given = columns.pop("ignore", ())
        datasets.Dataset.from_dict({"messages": messages, **columns}).to_parquet(tmp_path / "rows.parquet")
        place = ("parquet", str(tmp_path / "rows.parquet"))
        if not stream:
            return HFDataset(*place, ignore=given)[0]
        example, _ = next(HFStream(*place, ignore=given).read(0))
        if isinstance(example, ExampleError):
            raise example
        return example

    example = read([called('{"a": 1}')], tools=[json.dumps([TOOL])], origin=["web"], ignore=["origin"])
    assert example.tools == (TOOL,)
    assert [message.learn for message in example.messages] == [None, False, None, None]
    assert example.messages[1].tool_calls[0]["function"]["arguments"] == '{"a": 1}'
    assert example.messages[2].tool_call_id == "1"
    assert read([called({"a": 1})], tools=[[TOOL]]).messages[1].tool_calls[0]["function"]["arguments"] == {"a": 1}
    with pytest.raises(ExampleError, match="has origin, which is not known here"):
        read([called('{"a": 1}')], origin=["web"])
    with pytest.raises(ExampleError, match="has arguments of tool calls with null in them"):
        read([called({"a": 1}), called({"b": 1})])
    with pytest.raises(ExampleError, match="has tools with null in them"):
        read([said("a", "b")] * 2, tools=[[TOOL], [{"type": "function", "function": {"name": "g", "strict": True}}]])


def test_keys_of_json_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "0.json", json.dumps({"messages": said("a", "b"), "tools": [TOOL], "origin": "web"}).encode())
    with pytest.raises(ExampleError, match="has origin, which is not known here"):
        WebDatasetTars(str(tmp_path / "0.tar"))[0]
    assert WebDatasetTars(str(tmp_path / "0.tar"), ignore=["origin"])[0].tools == (TOOL,)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hello", "no list of messages"),
        (None, "no list of messages"),
        (["hello"], "a message that is no object"),
        ([{"role": "user"}], "message 1 without content"),
        ([{"role": "user", "content": "<video>"}], "1 <video> placeholders for 0 videos"),
    ],
)
def test_messages_that_make_no_sense(turns: Any, message: str, tmp_path: Path) -> None:
    source = MessagesJSONL(write_jsonl(tmp_path / "d.jsonl", [{"messages": turns}]))
    with pytest.raises(ExampleError, match=rf"\(line 1\) has {message}"):
        source[0]
