"""The schema of conversations as data: each key becomes a part of the example, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigmac_lightning.datamodules import Example, ExampleError, File, Image, Message, MessagesJSONL, Video, example_of
from tests.datamodules.examples import said, write_jsonl

CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
CALL_OF_OPENAI = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CAT, DOG, CLIP = Image(File.at("cat.png")), Image(File.at("dog.png")), Video(File.at("clip.mp4"))
ASKED = {"role": "user", "content": "?"}


def test_everything_has_its_place() -> None:
    given: Any = {
        "messages": [
            {"role": "user", "content": "<image> or <video>?", "loss": None, "tool_calls": None},
            {"role": "assistant", "content": None, "reasoning_content": "I call.", "tool_calls": [CALL], "loss": False},
            {"role": "tool", "content": "x", "name": "f", "tool_call_id": "1"},
            {"role": "assistant", "content": [{"type": "text", "text": "a <image>", "image": None}], "loss": 1},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, DOG]},
        ],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
        "audios": [],
        "objects": None,
    }
    assert example_of(given, [CAT, DOG], [CLIP], name="n") == Example(
        [
            Message("user", [CAT, " or ", CLIP, "?"]),
            Message("assistant", [], "I call.", (CALL,), learn=False),
            Message("tool", ["x"], name="f", tool_call_id="1"),
            Message("assistant", ["a <image>"], learn=True),
            Message("user", [DOG, "and", DOG]),
        ],
        None,
        "n",
        (TOOL,),
        {"enable_thinking": False},
    )
    assert example_of({**given, "tools": json.dumps([TOOL])}, [CAT, DOG], [CLIP], name="n").tools == (TOOL,)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": "a", "losses": 1}, "has losses in message 2, which is not known"),
        ({"content": "a", "loss": 0.5}, "message 2 with loss=0.5"),
        ({"content": "a", "loss": "no"}, "message 2 with loss='no'"),
        ({"content": 7}, "message 2 whose content is neither text nor a list of parts"),
        ({}, "message 2 without content"),
        ({"content": None}, "message 2 without content"),
        ({"content": "a", "role": ["user"]}, "message 2 whose role is no text"),
        ({"content": "a", "reasoning_content": ["b"]}, "message 2 whose reasoning_content is no text"),
        ({"content": "a", "tool_calls": "f"}, "no list of tool_calls in message 2"),
        ({"content": "a", "tool_calls": ["f"]}, "tool_calls in message 2 of which one is no object"),
        ({"content": [{"type": "audio"}]}, "has 1 <audio> placeholders for 0 audios"),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "the bytes in base64"),
        ({"content": [{"type": "file"}]}, "message 2 with a part of type 'file'"),
        ({"content": [{"type": "text"}]}, "message 2 with the part"),
        ({"content": [{"type": "image", "text": "cat"}]}, "message 2 with the part"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x", "detail": "low"}}]}, "'detail': 'low'"),
        ({"content": [{"type": "image_url"}]}, "message 2 with the part"),
        ({"content": [{"type": "image_url", "image": "a.png"}]}, "message 2 with the part"),
        ({"content": [{"type": "image", "image": "a.png", "path": "b.png"}]}, "message 2 with the part"),
        ({"content": [{"type": "video", "image": "a.png"}]}, "message 2 with the part"),
        ({"content": [{"type": "text", "text": "a", "path": "b.png"}]}, "message 2 with the part"),
        (
            {"content": [{"type": "image", "url": "https://x/a.png"}]},
            "the image 'https://x/a.png': nothing is download",
        ),
        (
            {"content": [{"type": "image", "image": "data:video/mp4;base64,AA=="}]},
            "data of type video/mp4 as its image",
        ),
        ({"content": [{"type": "image", "image": "data:image/png,AA"}]}, "give data:image/...;base64"),
        ({"content": [{"type": "image", "path": "../../a.png"}]}, "leads out of the media root"),
        ({"content": [{"type": "image", "path": ["a.png"]}]}, "names a file by ['a.png']"),
        ({"content": [{"type": "video", "video": "a.mp4", "fps": 2}]}, "has fps in a part of message 2"),
        ({"content": ["cat"]}, "is no JSON object in a part of message 2"),
    ],
)
def test_messages_are_refused_by_name(turn: Any, message: str) -> None:
    images = [CAT] if turn.get("content") == [{"type": "image", "text": "cat"}] else []
    with pytest.raises(ExampleError) as error:
        example_of({"messages": [ASKED, {"role": "assistant", **turn}]}, images)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (Message("user", ["a"], reasoning_content="b"), "role 'user' with reasoning_content, which is for role 'assis"),
        (Message("user", ["a"], tool_calls=[CALL]), "role 'user' with tool_calls, which is for role 'assistant'"),
        (Message("assistant", ["a"], name="f"), "role 'assistant' with name, which is for role 'tool'"),
        (Message("assistant", ["a"], tool_call_id="1"), "role 'assistant' with tool_call_id, which is for role 'tool'"),
        (Message("user", ["a"], learn=True), "only what the assistant says can be learnt"),
        (Message("assistant", [], tool_calls=[{"name": "f"}]), "has the tool call"),
        (Message("assistant", [], tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "are not JSON"),
        (Message("assistant", [], tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), "no JSON object"),
    ],
)
def test_what_does_not_go_together_in_a_message(turn: Message, message: str) -> None:
    with pytest.raises(ExampleError) as error:
        Example([Message("user", ["a"]), turn]).check()
    assert message in str(error.value)


OF_FORMATS: list[tuple[dict[str, Any], Example | str]] = [
    # ms-swift
    ({"messages": said("a", "b"), "tools": json.dumps([TOOL])},
     Example([Message("user", ["a"]), Message("assistant", ["b"])], tools=(TOOL,))),
    ({"messages": [ASKED, {"role": "assistant", "content": "b", "loss": False}, *said("c", "d")]},
     Example([Message("user", ["?"]), Message("assistant", ["b"], learn=False),
              Message("user", ["c"]), Message("assistant", ["d"])])),
    ({"system": "Be brief.", "messages": said("a", "b")},
     Example([Message("system", ["Be brief."]), Message("user", ["a"]), Message("assistant", ["b"])])),
    ({"messages": said("a", "b"), "objects": ["a"]}, "has objects, which is not known"),
    ({"messages": said("a", "b"), "objects": {"bbox": [[1, 2, 3, 4]]}}, "has objects, which is not known"),
    ({"messages": said("a", "b"), "rejected_response": "c"}, "has rejected_response: preferences cannot"),
    # LLaMA-Factory
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "tools": "[]"},
     Example([Message("system", ["s"]), Message("user", ["a"]), Message("assistant", ["b"])])),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]},
     "has calls of role 'function_call' that are not JSON"),
    # OpenAI
    ({"messages": [ASKED, {"role": "assistant", "content": "b", "weight": 0}]},
     Example([Message("user", ["?"]), Message("assistant", ["b"], learn=False)])),
    ({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL_OF_OPENAI]}], "tools": [TOOL]},
     Example([Message("user", ["?"]), Message("assistant", [], tool_calls=(CALL_OF_OPENAI,))], tools=(TOOL,))),
    ({"messages": [ASKED, {"role": "assistant", "content": None, "refusal": "No."}]}, "has refusal in message 2"),
    ({"messages": said("a", "b"), "parallel_tool_calls": False}, "has parallel_tool_calls, which is not known"),
    # TRL
    ({"messages": [ASKED, {"role": "assistant", "content": "b", "thinking": "c"}]}, "has thinking in message 2"),
    ({"messages": said("a", "b"), "chat_template_kwargs": {"x": 1}},
     Example([Message("user", ["a"]), Message("assistant", ["b"])], chat_template_kwargs={"x": 1})),
    # what says the same twice
    ({"system": "s", "messages": [{"role": "system", "content": "t"}, *said("a", "b")]}, "has system and a first"),
    ({"messages": [ASKED, {"role": "assistant", "content": "b", "loss": 1, "weight": 0}]}, "weight and loss"),
    ({"messages": said("a", "b"), "conversations": said("a", "b")}, "has conversations, which is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), OF_FORMATS)
def test_records_of_the_formats_in_use(record: dict[str, Any], expected: Example | str, tmp_path: Path) -> None:
    source = MessagesJSONL(write_jsonl(tmp_path / "d.jsonl", [record]))
    if isinstance(expected, Example):
        example = source[0]
        assert (example.messages, example.tools) == (expected.messages, expected.tools)
        assert example.chat_template_kwargs == expected.chat_template_kwargs
        return
    with pytest.raises(ExampleError) as error:
        source[0].check()
    assert expected in str(error.value)


def test_keys_that_are_to_be_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": said("a", "b"), "origin": "web"}])
    with pytest.raises(ExampleError, match=r"\(line 1\) has origin, which is not known here; known are messages"):
        MessagesJSONL(path)[0]
    ignoring = MessagesJSONL(path, ignore=["origin"])
    assert len(ignoring[0].messages) == 2
    assert ignoring.identity() != MessagesJSONL(path).identity()  # what was measured of one is not known of the other
