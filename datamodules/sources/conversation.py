"""The schema of a conversation as data, into which every format is translated, and its translation to an `Example`.

A key that the schema does not have is refused if it has a value. No file is opened::

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "<image>Is it warm here?"},
                  {"role": "assistant", "reasoning_content": "I must ask.", "tool_calls": [
                      {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "X"}}}]},
                  {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "1"},
                  {"role": "assistant", "content": "Yes.", "loss": true}],
     "tools": [{"type": "function", "function": {"name": "weather", "description": "...", "parameters": {...}}}],
     "chat_template_kwargs": {"enable_thinking": false}}
"""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Required, TypedDict

from ..errors import ExampleError
from ..example import Example, Image, MediaPart, Message, Video
from ..files import Roots
from ..media.modalities import MODALITIES
from .contents import Contents, TypedPart, known


class Turn(TypedDict, total=False):
    """A message. ``None`` means that there is no value.

    Attributes:
        role: see `Message`.
        content: a text, in which ``<image>`` and ``<video>`` stand for the next image or video; or a list of parts,
            each a `TypedPart`, an `Image`, a `Video` or another `MediaPart`. It may be missing if there are
            `tool_calls`. Placeholders in learnt messages are ordinary text if those in the other messages are as many
            as there are items of their modality.
        reasoning_content, tool_calls, name, tool_call_id: see `Message`.
        loss: whether an assistant's message is learnt: true or false, or 1 or 0; see `Message.learn`.
    """

    role: Required[str]
    content: str | Sequence[TypedPart | MediaPart] | None
    reasoning_content: str | None
    tool_calls: Sequence[Mapping[str, Any]] | None
    name: str | None
    tool_call_id: str | None
    loss: bool | None


class Conversation(TypedDict, total=False):
    """A conversation as data.

    Attributes:
        messages: at least one message.
        tools: JSON schemas as in `Example`, or the JSON text of a list of them.
        chat_template_kwargs: see `Example`.
    """

    messages: Required[Sequence[Turn]]
    tools: Sequence[Mapping[str, Any]] | str | None
    chat_template_kwargs: Mapping[str, Any] | None


def example_of(
    conversation: Conversation | Mapping[str, Any],
    images: Sequence[Image] = (),
    videos: Sequence[Video] = (),
    target: Image | None = None,
    name: str = "",
    media_root: Roots = ".",
    others: Mapping[str, Sequence[MediaPart]] = MappingProxyType({}),
) -> Example:
    """The example of a conversation.

    Args:
        images, videos: the media that placeholders, and parts without a file, stand for, in their order; all are used.
            If there are no placeholders and no such parts, they come before the first message of the user.
        target, name: see `Example`.
        media_root: folders of the files that parts name, see `Roots`.
        others: like `images` and `videos`, by modality.

    Raises:
        ExampleError: it is no such conversation, has another key, or has not one placeholder for each image and video.
    """
    given = known(conversation, Conversation.__annotations__, "")
    turns = _list_of_objects(given.get("messages"), "messages")
    items = {**dict.fromkeys(MODALITIES, ()), "image": images, "video": videos, **others}
    content = Contents(items, turns, media_root)
    messages = [_message(turn, number, content) for number, turn in enumerate(turns, start=1)]
    tools = given.get("tools", ())
    if isinstance(tools, str):
        tools = loaded(tools, "tools")
    variables = given.get("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        raise ExampleError(f"has chat_template_kwargs that are no object: {variables!r}")
    return Example(messages, target, name, _list_of_objects(tools, "tools"), variables)


def _message(turn: Mapping[str, Any], number: int, content: Contents) -> Message:
    where = f"message {number}"
    given = known(turn, Turn.__annotations__, f" in {where}")
    for key in ("role", "reasoning_content", "name", "tool_call_id"):
        if not isinstance(given.get(key, ""), str):
            raise ExampleError(f"has {where} whose {key} is no text, but {given[key]!r}")
    calls = _list_of_objects(given.get("tool_calls", ()), f"tool_calls in {where}")
    if "content" not in given and not calls:
        raise ExampleError(f"has {where} without content: {dict(turn)!r}")
    loss = given.get("loss")
    if loss not in (None, True, False):  # 1 and 0 are equal to them
        raise ExampleError(f"has {where} with loss={loss!r}: it is learnt (true) or not (false); no weights are known")
    return Message(
        given.get("role", ""),
        content.parts(turn, where),
        given.get("reasoning_content"),
        calls,
        given.get("name"),
        given.get("tool_call_id"),
        None if loss is None else bool(loss),
    )


def _list_of_objects(given: Any, what: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ExampleError(f"has no list of {what}, but {given!r}")
    for item in given:
        if not isinstance(item, Mapping):
            raise ExampleError(f"has {what} of which one is no object: {item!r}")
    return tuple(given)


def loaded(text: str, what: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text or "[]")
    except ValueError as error:
        raise ExampleError(f"has {what} that are not JSON: {error}") from error
