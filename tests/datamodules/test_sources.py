"""The examples that each source makes of its records, without opening a media file."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from bigmac_lightning.datamodules import (
    Audio,
    CaptionFolder,
    Example,
    ExampleError,
    HFDataset,
    HFStream,
    Image,
    LlavaJSON,
    MessagesJSONL,
    TextFiles,
    Video,
    WebDatasetTars,
)
from bigmac_lightning.datamodules.encoding.template import read_template
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
    path.write_text("{}\n{}")
    with pytest.raises(ValueError, match=r"llava.json is not JSON .* use MessagesJSONL"):
        LlavaJSON(path)
    path.write_text(json.dumps([{"conversations": turns}], indent=1))
    with pytest.raises(ValueError, match=r"llava.json is a JSON list, .* use LlavaJSON"):
        MessagesJSONL(path)


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark(tmp_path: Path) -> None:
    record = json.dumps({"messages": said("a", "b")}).encode()
    talk = [("user", ["a"]), ("assistant", ["b"])]
    path = tmp_path / "d"
    for content in (BOM + record + b"\n" + record, BOM + b"\n" + record + b"\n" + BOM + record):
        path.write_bytes(content)
        source = MessagesJSONL(path)
        assert [told(source[i]) for i in range(len(source))] == [talk, talk]
    path.write_bytes(BOM + b"[" + record + b"]")
    assert told(LlavaJSON(path)[0]) == talk
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "0.json", BOM + record)
        add(tar, "1.png", png())
        add(tar, "1.txt", BOM + b"a caption")
    tars = WebDatasetTars(str(tmp_path / "0.tar"))
    assert told(tars[0]) == talk
    assert told(tars[1])[1] == ("assistant", ["a caption"])
    path.write_bytes(BOM + b"some text")
    assert told(TextFiles([str(path)])[0]) == [("text", ["some text"])]
    path.write_bytes(BOM + b"{{ messages }}")
    assert read_template(path) == "{{ messages }}"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(png())
    (tmp_path / "photos" / "1.txt").write_bytes(BOM + b"a caption")
    assert told(CaptionFolder(tmp_path / "photos")[0])[1] == ("assistant", ["a caption"])


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_bytes(BOM + "eins ä\n\nzwei\n\n\n\n<image>".encode())
    (tmp_path / "2.txt").write_text("three")
    whole = TextFiles(str(tmp_path / "*.txt"))
    assert [told(whole[i]) for i in range(len(whole))] == [
        [("text", ["eins ä\n\nzwei\n\n\n\n<image>"])],
        [("text", ["three"])],
    ]
    parts = TextFiles(str(tmp_path / "*.txt"), separator="\n\n")
    assert [told(parts[i])[0][1] for i in range(len(parts))] == [["eins ä"], ["zwei"], ["<image>"], ["three"]]
    assert parts[1].name.endswith("1.txt, from byte 12")
    assert parts.identity() != whole.identity()
    (tmp_path / "3.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ExampleError, match=r"3.txt\) is not valid UTF-8"):
        TextFiles([str(tmp_path / "3.txt")])[0]
    with pytest.raises(ValueError, match=r"TextFiles: there is no file .*\*\.text: correct the path"):
        TextFiles(str(tmp_path / "*.text"))
    with pytest.raises(ValueError, match="separator is empty"):
        TextFiles(str(tmp_path / "*.txt"), separator="")


def test_members_of_tars_are_honoured_or_refused(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = [
        ("0.png", png()), ("0.txt", b"a"), ("0.cls", b"7"),
        ("1.png", png()), ("1.mid", b""), ("1.txt", b"a"),
        ("2.png", png()), ("2.txt", b"a"), ("2.json", b'{"caption": "b"}'),
        ("3.png", png()), ("3.json", b'{"caption": "b", "url": "x"}'),
        ("4.a.txt", b"a"), ("4.b.txt", b"a"), ("4.png", png()),
        ("5.png", png()), ("5.json", b'{"image": "5.png", "messages": []}'),
        ("6.json", b"[]"), ("7.json", b"{"), ("8.txt", b"alone"), ("9.txt", b"\xff"),
        ("A.json", b'{"messages": [{"role": "user", "content": [{"type": "image", "path": "5.png"}]}]}'),
    ]  # fmt: skip
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in members:
            add(tar, name, content)
    source = WebDatasetTars(str(tmp_path / "0.tar"))
    for index, message in enumerate(
        (
            "has .cls, which is not known here: name 'cls' in ignore",
            "has .mid, which is not known here",
            'has a .txt and another "caption" in its .json',
            "has url beside its caption",
            "has more than one .txt",
            "has .json with image: its media are the members",
            "has .json that is no object",
            "has text that cannot be read",
            "has a caption, and no image, video or audio",
            "has text that cannot be read",
            "names the image '5.png': no files are read but those that come with the record",
        )
    ):
        with pytest.raises(ExampleError) as error:
            source[index]
        assert message in str(error.value)
        assert f"0.tar: {index:X})" in str(error.value)
    ignoring = WebDatasetTars(str(tmp_path / "0.tar"), ignore=[".cls", "mid", "json"])
    assert [told(ignoring[i])[1] for i in range(3)] == [("assistant", ["a"])] * 3


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
    with pytest.raises(ValueError, match="WebDatasetTars: there is no file "):
        WebDatasetTars(str(tmp_path / "*.zip"))


def test_caption_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    assert "left out 1 images without a .txt beside them: lonely.png" in caplog.text
    assert "neither images" not in caplog.text
    for name in ("b/3.txt", "b/4.txt", "b/5.txt", "b/6.txt", "1.wav"):
        (tmp_path / name).write_text("alone")
    CaptionFolder(tmp_path)
    assert "left out 4 .txt without an image beside them: b/3.txt, b/4.txt, b/5.txt, ..." in caplog.text
    assert "left out 1 files that are neither images nor .txt: 1.wav" in caplog.text
    (tmp_path / "1.txt").write_bytes(b"\xff")
    with pytest.raises(ExampleError, match=r"\(1.png\) has a caption that is not valid UTF-8"):
        describe[0]
    assert told(CaptionFolder(tmp_path, task="draw")[1]) == [("user", ["two"])]
    assert told(CaptionFolder(tmp_path, "{a} {}", task="draw")[1]) == [("user", ["{a} two"])]
    with pytest.raises(ValueError, match="prompt='Draw it' must have"):
        CaptionFolder(tmp_path, "Draw it", task="draw")
    with pytest.raises(ValueError, match="task='paint'"):
        CaptionFolder(tmp_path, task="paint")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"CaptionFolder: there is no folder .*nowhere: correct the path"):
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


@pytest.mark.parametrize("stream", [False, True])
def test_media_in_columns(stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and paths, of the library's own types and of others, alone and in lists, in parts of messages as well."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    (tmp_path / "a.png").write_bytes(png(7))
    monkeypatch.chdir(tmp_path)  # where the library looks for files, to put their bytes into Parquet

    def read(features: dict[str, Any] | None = None, **columns: Any) -> Example:
        made = datasets.Dataset.from_dict({name: [value] for name, value in columns.items()})
        for name, feature in (features or {}).items():
            made = made.cast_column(name, feature)
        made.to_parquet(tmp_path / "rows.parquet")
        place = ("parquet", str(tmp_path / "rows.parquet"))
        if not stream:
            return HFDataset(*place, media_root=tmp_path)[0]
        example, _ = next(HFStream(*place, media_root=tmp_path).read(0))
        if isinstance(example, ExampleError):
            raise example
        return example

    def contents(example: Example) -> list[bytes]:
        opened = [item.file.open() for item in example.media]
        found = [file.read() for file in opened]
        for file in opened:
            file.close()
        return found

    row, path = {"bytes": png(3), "path": None}, {"bytes": None, "path": "a.png"}
    talk, pair = said("<image>?", "b"), said("<image> <image>?", "b")
    assert contents(read(messages=talk, image=png(3))) == [png(3)]
    assert contents(read(messages=talk, image="a.png")) == [png(7)]
    assert contents(read(messages=talk, image=row)) == [png(3)]
    assert contents(read({"image": datasets.Image()}, messages=talk, image=row)) == [png(3)]
    assert contents(read({"images": datasets.List(datasets.Image())}, messages=pair, images=[row, path])) == [
        png(3),
        png(7),
    ]
    assert contents(read(messages=pair, images=[png(1), png(2)])) == [png(1), png(2)]
    videos = read({"video": datasets.Video()}, messages=said("?", "b"), video=row)
    assert isinstance(videos.media[0], Video)
    assert contents(videos) == [png(3)]
    parts = [{"role": "user", "content": [{"type": "image", "image": row}, {"type": "image", "image": path}]}]
    typed = {"messages": [{"role": datasets.Value("string"),
                           "content": [{"type": datasets.Value("string"), "image": datasets.Image()}]}]}  # fmt: skip
    assert contents(read(messages=parts)) == [png(3), png(7)]
    assert contents(read(typed, messages=parts)) == [png(3), png(7)]
    drawn = read({"target": datasets.Image()}, messages=said("draw", "")[:1], target=row)
    assert drawn.target is not None
    assert drawn.media == []
    with pytest.raises(ExampleError, match="has 2 <image> placeholders for 1 images"):
        read(messages=pair, image=row)
    with pytest.raises(ExampleError, match="has image and images"):
        read(messages=talk, image=row, images=[row])
    sound = read({"audio": datasets.Audio()}, messages=said("<audio>?", "b"), audio=row)
    assert isinstance(sound.media[0], Audio)
    assert contents(sound) == [png(3)], "whatever its bytes are"
    with pytest.raises(ExampleError, match="nothing is downloaded"):
        read(messages=talk, image="https://x/a.png")
    with pytest.raises(ExampleError, match="leads out of the media root"):
        read(messages=talk, image={"bytes": None, "path": "/etc/passwd"})
    if not stream:
        with pytest.raises(ValueError, match=r"the rows have columns \['image'\]: \"messages\" or"):
            read(image=row)


@pytest.mark.parametrize("given", [png(), [png()], {"bytes": png(), "path": None}])
def test_bytes_in_columns_are_read_when_they_are_opened(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    datasets.Dataset.from_list([{"caption": "a", "image": given}]).to_parquet(tmp_path / "rows.parquet")
    (image,) = HFDataset("parquet", str(tmp_path / "rows.parquet"))[0].media
    assert image.file.name.endswith(", row 0, image 0")
    with image.file.open() as stream:
        assert stream.read() == png()


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
