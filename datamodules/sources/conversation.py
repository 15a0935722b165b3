"""The one schema of a conversation as data, and the `Example` that becomes of it.

Every format is translated into it. A key that it does not name is refused, as long as it has a value. Knows no format,
and opens no file::

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
from typing import Any, Required, TypedDict

from ..example import Example, ExampleError, Image, Message, Roots, Video
from .contents import Contents, TypedPart, known


class Turn(TypedDict, total=False):
    """A message. ``None`` is as good as no value.

    Attributes:
        role: as of `Message`.
        content: a text, in which ``<image>`` and ``<video>`` stand for the next one; or a list of parts, of which some
            may be an `Image` or `Video` themselves. It may be missing where there are `tool_calls`. In what is learnt
            they are words, if the others alone are as many as there are images, or videos.
        reasoning_content, tool_calls, name, tool_call_id: as of `Message`.
        loss: whether an assistant's message is learnt: true or false, or 1 or 0; `Message.learn`.
    """

    role: Required[str]
    content: str | Sequence[TypedPart | Image | Video] | None
    reasoning_content: str | None
    tool_calls: Sequence[Mapping[str, Any]] | None
    name: str | None
    tool_call_id: str | None
    loss: bool | None


class Conversation(TypedDict, total=False):
    """
    Attributes:
        messages: at least one.
        tools: JSON schemas as of `Example`, or the JSON text of a list of them.
        chat_template_kwargs: as of `Example`.
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
) -> Example:
    """
    Args:
        images, videos: what placeholders and parts without a file stand for, in their order; all are used. Where
            nothing stands for them, they come before the first message of the user.
        target, name: of the example.
        media_root: of files that parts name, as of `Roots`.

    Raises:
        ExampleError: it is no such conversation, has a key beyond those, or not as many places as images and videos.
    """
    given = known(conversation, Conversation, "")
    turns = _list_of_objects(given.get("messages"), "messages")
    content = Contents({"image": list(images), "video": list(videos)}, turns, media_root)
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
    given = known(turn, Turn, f" in {where}")
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
    try:
        return json.loads(text or "[]")
    except ValueError as error:
        raise ExampleError(f"has {what} that are not JSON: {error}") from error
