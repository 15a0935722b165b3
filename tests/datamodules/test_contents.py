"""The places of images and videos in messages, and texts in which ``<image>`` is ordinary text."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules import Example, ExampleError, File, Image, MessagesJSONL, Video, example_of
from bigmac_lightning.datamodules.media.decoding import measure
from tests.datamodules.examples import said, write_jsonl
from tests.datamodules.format_table import of, png, text

A, B, CLIP = Image(File.at("a.png")), Image(File.at("b.png")), Video(File.at("clip.mp4"))
NEXT: dict[str, Any] = {"type": "image"}


def parts(turns: list[Any], images: Any = (), videos: Any = ()) -> list[list[Any]]:
    return [list(message.parts) for message in example_of({"messages": turns}, images, videos).messages]


def test_what_nothing_stands_for_comes_before_the_first_message_of_the_user() -> None:
    turns = [of("system", "Be brief."), *said("Who?", "A cat."), *said("Where?", "Home.")]
    assert parts(turns, [A, B], [CLIP])[1] == [A, B, CLIP, "Who?"]
    assert parts([of("user", [text("Who?")]), of("assistant", "?")], [A])[0] == [A, "Who?"]
    assert parts(said("", "A cat."), [A])[0] == [A]
    # one kind has its places, the other has none
    assert parts(said("Who? <image>", "A cat."), [A], [CLIP])[0] == [CLIP, "Who? ", A]
    assert parts([of("user", [NEXT, text("?")]), of("assistant", "?")], [A], [CLIP])[0] == [CLIP, A, "?"]


def test_a_word_in_a_reply() -> None:
    reply = "Write <image> or <video> there."
    assert parts(said("How?", reply)) == [["How?"], [reply]]
    assert parts(said("<image>How?", reply), [A]) == [[A, "How?"], [reply]]
    assert parts([of("user", [NEXT]), of("assistant", reply)], [A]) == [[A], [reply]]
    both = [of("user", "<image>"), of("assistant", "<image>")]
    assert parts(both, [A, B]) == [[A], [B]]
    assert parts(both, [A]) == [[A], ["<image>"]]
    assert parts([of("text", reply)]) == [[reply]]
    assert parts([of("text", "a <image> b")], [A]) == [["a ", A, " b"]]
    assert parts([of("text", "<image>: ", loss=False), of("text", "<image>")], [A]) == [[A, ": "], ["<image>"]]


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        (said("<image>", "A cat."), [A, B], "has 1 <image> placeholders for 2 images. If <image> is ordinary text"),
        (said("<image><image>", "A cat."), [A], "has 2 <image> placeholders for 1 images"),
        (said("<image> <image>", "<image>"), [A], "has 3 <image> placeholders for 1 images"),
        (said("What is <image>?", "A word."), [], "has 1 <image> placeholders for 0 images"),
        (said("Who?", "<image><image>"), [A], "has 2 <image> placeholders for 1 images"),
        ([of("tool", "<image>"), *said("a", "b")], [], "has 1 <image> placeholders for 0 images"),
        ([of("user", [{"type": "image", "path": "c.png"}]), *said("a", "b")], [A], "has 0 <image> placeholders for 1"),
        ([of("user", [B]), *said("a", "b")], [A], "has 0 <image> placeholders for 1"),
        ([of("user", [text("<image>Who?")]), of("assistant", "?")], [A], "has <image> in the text of a part"),
        ([of("assistant", "A cat.")], [A], "has images and no <image> for them, nor a message of the user"),
        ([of("text", "A cat.")], [A], "has images and no <image> for them, nor a message of the user"),
    ],
)
def test_numbers_that_differ(turns: list[Any], images: list[Image], message: str) -> None:
    with pytest.raises(ExampleError) as error:
        example_of({"messages": turns}, images)
    assert message in str(error.value)


def read(folder: Path, record: dict[str, Any]) -> Example:
    return MessagesJSONL(write_jsonl(folder / "d.jsonl", [record]))[0]


def test_files_of_parts(tmp_path: Path) -> None:
    """By every key, relative to the media root, from a URI, and with a size."""
    (tmp_path / "with a space.png").write_bytes(png(width=5))
    inside = tmp_path / "with a space.png"
    data = base64.b64encode(png(width=7)).decode()
    given: list[tuple[dict[str, Any], int]] = [
        ({"type": "image", "image": inside.name}, 5),
        ({"type": "image", "path": str(inside)}, 5),
        ({"type": "image", "url": inside.as_uri()}, 5),
        ({"type": "image_url", "image_url": inside.name}, 5),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, 7),
        ({"type": "image", "base64": data, "text": None}, 7),
        ({"type": "image", "image": {"path": inside.name, "height": 8, "width": 3}}, 3),
    ]
    example = read(tmp_path, {"messages": [of("user", [part for part, _ in given]), of("assistant", "?")]})
    assert [measure(item).width for item in example.media] == [width for _, width in given]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("http://x/a.png", "names the image 'http://x/a.png': nothing is downloaded"),
        ("s3://x/a.png", "nothing is downloaded"),
        ("data:text/plain;base64,AA==", "has data of type text/plain as its image"),
        ("data:image/png;base64", "give data:image/...;base64"),
        ("file:///etc/passwd", "leads out of the media root"),
        ({"path": "a.png", "mode": "RGB"}, "has {'mode': 'RGB'} for the image 'a.png'"),
        (7, "names a file by 7"),
    ],
)
def test_files_that_are_refused(image: Any, message: str, tmp_path: Path) -> None:
    for record in (
        {"messages": said("<image>", "?"), "images": [image]},
        {"messages": [of("user", [{"type": "image", "image": image}]), of("assistant", "?")]},
    ):
        with pytest.raises(ExampleError) as error:
            read(tmp_path, record)
        assert message in str(error.value)
        assert "(line 1)" in str(error.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "has the prompt 'a' and the completion None"),
        ({"completion": "a"}, "has the prompt None and the completion 'a'"),
        ({"prompt": said("a", "b"), "completion": "c"}, "give two texts or two lists of messages"),
        ({"prompt": [of("assistant", "a", loss=True)], "completion": said("a", "b")}, "only the completion is learnt"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "has text, which is not known"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has chosen, rejected: preferences cannot be learnt from"),
        ({"messages": said("a", "b"), "rejected_response": "c"}, "has rejected_response: preferences cannot be learnt"),
        ({"conversations": said("a", "b"), "kto_tag": True}, "has kto_tag: preferences cannot be learnt from"),
        ({"prompt": "a", "completion": "b", "label": False}, "has label, which is not known"),
        ({"instruction": "a", "output": "b"}, 'has no list of messages, but instruction, output: it needs "messages"'),
        ({"query": "a", "response": "b"}, "has no list of messages, but query, response"),
        ({"conversation": [{"human": "a", "assistant": "b"}]}, "has no list of messages, but conversation"),
        ({}, "has no list of messages, but nothing"),
        ({"text": ["a"]}, "has a text that is no text"),
        ({"text": "a", "tools": [{"name": "f"}]}, "has text without a template and tools"),
        ({"text": "a", "system": "b"}, "has text without a template and messages of other roles"),
        ({"caption": "a"}, "has a caption, and no image, video or audio"),
        ({"caption": "a", "text": "b", "image": "a.png"}, "has text beside its caption"),
        ({"caption": ["a"], "image": "a.png"}, "has a caption that is no text"),
        ({"text": "<image>, <image>", "image": "a.png"}, "has 2 <image> placeholders for 1 images"),
        ({"messages": said("a", "b"), "image": "a.png", "images": ["a.png"]}, "has image and images"),
        ({"messages": [of("user", "a"), of("tool_call", "f(x)")]}, "has calls of role 'tool_call' that are not JSON"),
        ({"messages": [of("user", "a"), of("tool_call", '{"f": 1}')]}, "has the tool call"),
        ({"messages": [of("assistant", "a", loss=True), of("tool_call", "{}")]}, "of which only one is learnt"),
    ],
)
def test_records_that_are_refused(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExampleError) as error:
        read(tmp_path, record).check()
    assert message in str(error.value)


def test_calls_that_are_messages_belong_to_the_reply_before(tmp_path: Path) -> None:
    call = json.dumps({"name": "f", "arguments": {"a": 1}})
    calls = [of("tool_call", call), of("tool_call", f"[{call}, {call}]")]
    example = read(tmp_path, {"messages": [of("user", "?"), of("assistant", "I look."), *calls, of("tool", "x")]})
    assert [(message.role, list(message.parts), len(message.tool_calls)) for message in example.messages] == [
        ("user", ["?"], 0),
        ("assistant", ["I look."], 3),
        ("tool", ["x"], 0),
    ]


def test_text_with_images_in_it(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    text = read(tmp_path, {"text": "One <image> and <image>.", "images": ["a.png", "b.png"]})
    assert [message.role for message in text.messages] == ["text"]
    assert [part if isinstance(part, str) else part.file.name[-5:] for part in text.messages[0].parts] == [
        "One ",
        "a.png",
        " and ",
        "b.png",
        ".",
    ]
    done = read(tmp_path, {"prompt": "<image>: ", "completion": "an <image>", "images": ["a.png"]})
    assert [(message.learn, len(message.parts)) for message in done.messages] == [(False, 2), (None, 1)]
