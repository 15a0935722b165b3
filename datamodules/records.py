"""From records of the formats in use to the one schema of conversation.py.

Knows names of keys and roles; opens nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .conversation import example_of
from .example import Example, ExampleError, Image, Video

SPEAKERS = {"human": "user", "gpt": "assistant"}


def example_of_record(
    record: Any,
    images: Sequence[Image],
    videos: Sequence[Video],
    target: Image | None = None,
    name: str = "",
    used: Sequence[str] = (),
) -> Example:
    """
    Args:
        record: "messages" or "conversations" of ``{"role", "content"}`` or ``{"from", "value"}``; and "system" and
            "weight", as ms-swift, LLaMA-Factory and OpenAI have them, beside what `Conversation` has.
        images, videos, target, name: as of `example_of`.
        used: keys of the record that the source has read itself, or leaves out.

    Raises:
        ExampleError: it is no such record, or has something else.
    """
    if not isinstance(record, Mapping):
        raise ExampleError(f"is no JSON object: {record!r}")
    given = {key: value for key, value in record.items() if key not in used and value is not None}
    turns = given.pop("messages") if "messages" in given else given.pop("conversations", None)
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
        raise ExampleError(f"has no list of messages, but {turns!r}")
    turns = [_turn(turn) for turn in turns]
    if system := given.pop("system", None):
        if turns and turns[0].get("role") == "system":
            raise ExampleError("has system and a first message of role 'system': leave out one of them")
        turns.insert(0, {"role": "system", "content": system})
    return example_of({**given, "messages": turns}, images, videos, target, name)


def _turn(turn: Any) -> dict[str, Any]:
    """A message with the keys of `Turn`."""
    if not isinstance(turn, Mapping):
        raise ExampleError(f"has a message that is no object: {turn!r}")
    given = {key: value for key, value in turn.items() if value is not None}
    for theirs, ours in (("from", "role"), ("value", "content"), ("weight", "loss")):
        if theirs in given:
            if ours in given:
                raise ExampleError(f"has a message with {theirs} and {ours}, which say the same: {dict(turn)!r}")
            given[ours] = given.pop(theirs)
    role = given.get("role")
    return {**given, "role": SPEAKERS.get(role, role) if isinstance(role, str) else str(role)}


def check_columns(row: Mapping[str, Any]) -> None:
    """
    Raises:
        ExampleError: objects in the row have null in them. Columns of Arrow give each object the keys of all others, so
            that it cannot be told whether the null has been in the data.
    """
    turns = row.get("messages", row.get("conversations"))
    calls = [call for turn in turns or () if isinstance(turn, Mapping) for call in turn.get("tool_calls") or ()]
    arguments = [call["function"].get("arguments") for call in calls if isinstance(call.get("function"), Mapping)]
    for what, given in (("arguments of tool calls", arguments), ("tools", row.get("tools"))):
        if _has_null(given):
            raise ExampleError(
                f"has {what} with null in them, which columns put wherever one object has a key that another has not: "
                "store them as JSON text"
            )


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(_has_null(item) for item in value)
