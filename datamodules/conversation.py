"""The one schema of a conversation as data, and the `Example` that becomes of it.

Every format is translated into it. A key that it does not name is refused, as long as it has a value. Knows no format
and no file::

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
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Required, TypedDict

from .example import Example, ExampleError, Image, Message, Part, Video


class TypedPart(TypedDict, total=False):
    """A part of a message. Placeholders in its text are text.

    Attributes:
        type: "text"; or "image" or "video": the next one.
        text: of type "text".
    """

    type: Required[str]
    text: str


class Turn(TypedDict, total=False):
    """A message. ``None`` is as good as no value.

    Attributes:
        role: as of `Message`.
        content: a text, in which ``<image>`` and ``<video>`` stand for the next one; or a list of parts, of which some
            may be an `Image` or `Video` themselves. It may be missing where there are `tool_calls`.
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
) -> Example:
    """
    Args:
        images, videos: what placeholders and parts without a file stand for, in their order; all are used.
        target, name: of the example.

    Raises:
        ExampleError: it is no such conversation, has a key beyond those, or not as many places as images and videos.
    """
    given = _known(conversation, Conversation, "")
    turns = _list_of_objects(given.get("messages"), "messages")
    left: dict[str, list[Any]] = {"image": list(images), "video": list(videos)}
    places = [kind for turn in turns for kind in places_of(turn)]
    for kind, items in left.items():
        if places.count(kind) != len(items):
            raise ExampleError(f"has {places.count(kind)} <{kind}> placeholders for {len(items)} {kind}s")
    messages = [_message(turn, number, left) for number, turn in enumerate(turns, start=1)]
    tools = given.get("tools", ())
    if isinstance(tools, str):
        tools = _loaded(tools, "tools")
    variables = given.get("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        raise ExampleError(f"has chat_template_kwargs that are no object: {variables!r}")
    return Example(messages, target, name, _list_of_objects(tools, "tools"), variables)


def _message(turn: Mapping[str, Any], number: int, left: dict[str, list[Any]]) -> Message:
    where = f"message {number}"
    given = _known(turn, Turn, f" in {where}")
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
        _parts(given.get("content", ""), where, left),
        given.get("reasoning_content"),
        calls,
        given.get("name"),
        given.get("tool_call_id"),
        None if loss is None else bool(loss),
    )


def _parts(content: Any, where: str, left: dict[str, list[Any]]) -> list[Part]:
    if isinstance(content, str):
        pieces = re.split("(<image>|<video>)", content)
        parts = [left[piece[1:-1]].pop(0) if piece in ("<image>", "<video>") else piece for piece in pieces]
        return [part for part in parts if part != ""]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ExampleError(f"has {where} whose content is neither text nor a list of parts, but {content!r}")
    return [_part(part, where, left) for part in content]


def _part(part: Any, where: str, left: dict[str, list[Any]]) -> Part:
    if isinstance(part, Image | Video):
        return part
    given = _known(part, TypedPart, f" in a part of {where}")
    kind, text = given.get("type"), given.get("text")
    if kind == "text" and isinstance(text, str):
        return text
    if kind in left and text is None:
        return left[kind].pop(0)
    raise ExampleError(
        f'has {where} with the part {part!r}: give {{"type": "text", "text": ...}}, {{"type": "image"}} or '
        '{"type": "video"}'
    )


def places_of(turn: Any) -> Iterator[str]:
    """Which kinds the places for images and videos in a message are of, in their order."""
    content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
    if isinstance(content, str):
        yield from re.findall("<(image|video)>", content)
    elif isinstance(content, Sequence):
        kinds = [part.get("type") for part in content if isinstance(part, Mapping)]
        yield from (kind for kind in kinds if kind in ("image", "video"))


def _known(given: Any, schema: Any, where: str) -> dict[str, Any]:
    """What has a value.

    Raises:
        ExampleError: there is a value under a key that the schema does not have.
    """
    if not isinstance(given, Mapping):
        raise ExampleError(f"is no JSON object{where}: {given!r}")
    keys = schema.__annotations__
    unknown = [str(key) for key, value in given.items() if key not in keys and value not in (None, "", [], {}, ())]
    if unknown:
        raise ExampleError(f"has {', '.join(unknown)}{where}, which is not known here; known are {', '.join(keys)}")
    return {key: value for key, value in given.items() if key in keys and value is not None}


def _list_of_objects(given: Any, what: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ExampleError(f"has no list of {what}, but {given!r}")
    for item in given:
        if not isinstance(item, Mapping):
            raise ExampleError(f"has {what} of which one is no object: {item!r}")
    return tuple(given)


def _loaded(text: str, what: str) -> Any:
    try:
        return json.loads(text or "[]")
    except ValueError as error:
        raise ExampleError(f"has {what} that are not JSON: {error}") from error
