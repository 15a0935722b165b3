"""Translates records of the formats in use into the schema of conversation.py. Nothing is opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from ..errors import ExampleError
from ..example import Example, MediaPart, Message
from ..media.modalities import MODALITIES, any_of_them
from .contents import places
from .conversation import example_of, loaded
from .media_files import media_at

SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool", "tool_response": "tool"}
CALLS = ("function_call", "tool_call")
"""Roles whose content is the JSON text of one or several tool calls."""
PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag")
FORMS = '"messages" or "conversations", "prompt" and "completion", "text", or "caption"'
DESCRIBE = "Describe what you see."


@dataclass(frozen=True)
class Records:
    """Makes examples of a source's records.

    A record has one of these forms:

    - "messages" or "conversations", of ``{"role", "content"}`` or ``{"from", "value"}``, and the other keys of
      `Conversation`;
    - "prompt" and "completion", both texts or both lists of messages;
    - "text", to which no template is applied;
    - "caption" with media; a "text" without placeholders beside them is a caption, too.

    Media are under "image", "images", "video", "videos" and so on for each modality, see `media_at`; "target" is an
    image that a generator learns to make, "system" is the first message, and "id" is a part of the example's name.

    Attributes:
        roots: folders of media that are given by path.
        ignore: keys that are left out.
        prompt: the user's words for records that are only a caption.
    """

    roots: tuple[Path, ...]
    ignore: tuple[str, ...] = ()
    prompt: str = DESCRIBE

    def identity(self) -> str:
        """A text that is different for records that are read differently."""
        return repr(([str(folder.resolve()) for folder in self.roots], self.ignore, self.prompt))

    def example(self, record: Any, name: str = "") -> Example:
        """The example of a record.

        Raises:
            ExampleError: the record has none of these forms, or has other keys.
        """
        if not isinstance(record, Mapping):
            raise ExampleError(f"is no JSON object: {shortened(record)}")
        given = {key: value for key, value in record.items() if key not in self.ignore and value is not None}
        if found := [key for key in PREFERENCES if key in given]:
            raise ExampleError(
                f"has {', '.join(found)}: preferences cannot be learnt from. Give the reply that is to be learnt as "
                '"completion" beside its "prompt", or as the last message, and leave the others out'
            )
        if (number := given.pop("id", None)) is not None:
            name = f"{name}, {number}" if name else str(number)
        media = self._media(given)
        target = given.pop("target", None)
        drawn = None if target is None else media_at("image", target, self.roots, "target")
        if "messages" not in given and "conversations" not in given:
            captions = [key for key in ("caption", "text") if key in given]
            if captions and (captions[0] == "caption" or (any(media.values()) and not _has_places(given["text"]))):
                return self._captioned(given, captions[0], media, name)
        return example_of(_conversation(given), target=drawn, name=name, media_root=self.roots, others=media)

    def _media(self, given: dict[str, Any]) -> dict[str, list[MediaPart]]:
        """The media of a record by modality, whose keys are removed from it."""
        found: dict[str, list[MediaPart]] = {name: [] for name in MODALITIES}
        for key, kind in media_keys().items():
            value = given.pop(key, None)
            items = [] if value is None else [*value] if isinstance(value, list | tuple) else [value]
            if items and found[kind]:
                raise ExampleError(f"has {kind} and {kind}s: leave out one of them")
            found[kind] += [media_at(kind, item, self.roots, f"{key} {k}") for k, item in enumerate(items)]
        return found

    def _captioned(self, given: dict[str, Any], key: str, media: dict[str, list[MediaPart]], name: str) -> Example:
        caption = given.pop(key)
        if given:
            raise ExampleError(f"has {', '.join(given)} beside its {key}: name them in ignore to leave them out")
        return captioned([item for items in media.values() for item in items], self.prompt, caption, name)


def media_keys() -> dict[str, str]:
    """The keys of records under which media are, with their modalities."""
    return {key: name for name in MODALITIES for key in (name, f"{name}s")}


def captioned(media: Sequence[MediaPart], prompt: str, caption: Any, name: str) -> Example:
    """The example of media and a caption that describes them.

    Raises:
        ExampleError: the caption is no text, there are no media, or the prompt has placeholders.
    """
    if not isinstance(caption, str):
        raise ExampleError(f"has a caption that is no text, but {caption!r}")
    if not media:
        raise ExampleError(f"has a caption, and no {any_of_them()}")
    if _has_places(prompt):
        raise ExampleError(f"has the prompt {prompt!r}: media come before it, so leave out their placeholders")
    return Example([Message("user", [*media, prompt]), Message("assistant", [caption])], name=name)


def _conversation(given: dict[str, Any]) -> dict[str, Any]:
    """A record with the keys of `Conversation`."""
    if "messages" in given or "conversations" in given:
        turns = _turns(given.pop("messages") if "messages" in given else given.pop("conversations"), "messages")
    elif "prompt" in given or "completion" in given:
        turns = _completion(given.pop("prompt", None), given.pop("completion", None))
    elif "text" in given:
        turns = [{"role": "text", "content": _text(given.pop("text"), "text")}]
    else:
        raise ExampleError(f"has no list of messages, but {', '.join(given) or 'nothing'}: it needs {FORMS}")
    if system := given.pop("system", None):
        if turns and turns[0].get("role") == "system":
            raise ExampleError("has system and a first message of role 'system': leave out one of them")
        turns.insert(0, {"role": "system", "content": system})
    if given.get("tools"):
        given["tools"] = _tools(given["tools"])
    return {**given, "messages": turns}


def _completion(prompt: Any, completion: Any) -> list[dict[str, Any]]:
    """The messages of a prompt and of its completion. Only the completion is learnt."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "text", "content": prompt, "loss": False}, {"role": "text", "content": completion}]
    if not isinstance(prompt, list | tuple) or not isinstance(completion, list | tuple):
        raise ExampleError(
            f"has the prompt {prompt!r} and the completion {completion!r}: give two texts or two lists of messages"
        )
    turns = _turns(prompt, "messages of the prompt")
    for turn in turns:
        if turn.setdefault("loss", False):
            raise ExampleError("has a message of its prompt with loss=true: only the completion is learnt")
    return turns + _turns(completion, "messages of the completion")


def _turns(given: Any, what: str) -> list[dict[str, Any]]:
    """Messages with the keys of `Turn`. A tool call that is a message of its own is joined to the message before."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ExampleError(f"has no list of {what}, but {given!r}")
    turns: list[dict[str, Any]] = []
    for item in given:
        turn = _turn(item)
        if turn["role"] in CALLS:
            turn = {**turn, "role": "assistant", "content": None, "tool_calls": _calls(turn)}
            if turns and turns[-1]["role"] == "assistant":
                before = turns.pop()
                if before.get("loss") != turn.get("loss"):
                    raise ExampleError(
                        "has an assistant's message and a tool call after it, of which only one is learnt"
                    )
                turn = {**before, "tool_calls": [*(before.get("tool_calls") or ()), *turn["tool_calls"]]}
        turns.append(turn)
    return turns


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


def _calls(turn: Mapping[str, Any]) -> list[Any]:
    """The tool calls of a message that has nothing else."""
    if turn.get("tool_calls"):
        raise ExampleError(f"has a message of role {turn['role']!r} with tool_calls, which its content has already")
    given = loaded(_text(turn.get("content"), f"content of role {turn['role']!r}"), f"calls of role {turn['role']!r}")
    calls = given if isinstance(given, list) else [given]
    return [{"type": "function", "function": call} for call in calls]


def _tools(given: Any) -> Any:
    """Tools with their functions under "function", also if they were given without that key."""
    tools = loaded(given, "tools") if isinstance(given, str) else given
    if not isinstance(tools, list | tuple):
        return tools
    bare = [isinstance(tool, Mapping) and "name" in tool and not {"type", "function"} & tool.keys() for tool in tools]
    return [{"type": "function", "function": t} if alone else t for t, alone in zip(tools, bare, strict=True)]


def _text(given: Any, what: str) -> str:
    if not isinstance(given, str):
        raise ExampleError(f"has a {what} that is no text, but {given!r}")
    return given


def _has_places(text: Any) -> bool:
    return isinstance(text, str) and places().search(text) is not None


def check_columns(row: Mapping[str, Any]) -> None:
    """
    Raises:
        ExampleError: objects in the row contain null. Columns of Arrow give each object the keys of all others, so that
            it is not known whether the null was in the data.
    """
    lists = [row.get(key) for key in ("messages", "conversations", "prompt", "completion")]
    turns = [turn for given in lists if isinstance(given, list) for turn in given]
    calls = [call for turn in turns if isinstance(turn, Mapping) for call in turn.get("tool_calls") or ()]
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
