"""The schema of examples, which all sources return: a list of messages whose parts are text, images and other media.

Nothing is opened or decoded here: an item of media is a file, and its size if the source knows it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import ExampleError
from .files import File

ROLES = ("system", "developer", "user", "assistant", "tool", "text")


@dataclass(frozen=True)
class Size:
    """The size of an item of media, which is known before it is decoded.

    Attributes:
        height, width: in pixels, as displayed; 1 for what has no pixels.
        frames: number of frames of a video, of samples of a sound, or of steps; 1 for an image.
        seconds: duration of a video or sound, in seconds.
    """

    height: int
    width: int
    frames: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class MediaPart:
    """An item of media as a part of a message. Each modality has a class of its own, see media/modalities.py.

    Attributes:
        file: its file.
        size: its size, if the source knows it. Otherwise the header of the file is read when examples are measured.
    """

    file: File
    size: Size | None = None


class Image(MediaPart):
    """An image, as a part of a message or as the target of a generator."""


class Video(MediaPart):
    """A video."""


class Audio(MediaPart):
    """A sound, or the sound of a video."""


Part = str | MediaPart


@dataclass(frozen=True)
class Message:
    """A message of a conversation, or a text without a template.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool"; or "text": a text that no one speaks, to which no
            template is applied.
        parts: texts and media, in their order; empty if an assistant only calls tools.
        reasoning_content: the reasoning of the assistant before its reply.
        tool_calls: the assistant's: ``{"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}``.
            Arguments are an object or its JSON text; type and id may be missing.
        name: the tool whose result a "tool" message is.
        tool_call_id: the id of the call whose result it is.
        learn: whether the model learns it. ``None``: an assistant's message is learnt if `ChatOptions.learn` says so,
            and a "text" always. Messages of other roles cannot be learnt.
    """

    role: str
    parts: Sequence[Part]
    reasoning_content: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    name: str | None = None
    tool_call_id: str | None = None
    learn: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            raise TypeError("a message's parts are a list: Message('user', ['text'])")

    def check(self) -> None:
        """
        Raises:
            ExampleError: the role is not known, or the message has something that its role cannot have.
        """
        if self.role not in ROLES:
            raise ExampleError(f"has a message of role {self.role!r}; roles are {', '.join(ROLES)}")
        if self.learn not in (None, True, False):
            raise ExampleError(f"has a message with learn={self.learn!r}: it is learnt (True) or not (False)")
        speech = {"reasoning_content": self.reasoning_content, "tool_calls": self.tool_calls}
        result = {"tool_call_id": self.tool_call_id, "name": self.name}
        for role, given in (("assistant", speech), ("tool", result)):
            for what, value in given.items():
                if value and self.role != role:
                    raise ExampleError(f"has a message of role {self.role!r} with {what}, which is for role {role!r}")
        if self.learn and self.role not in ("assistant", "text"):
            raise ExampleError(
                f"has a message of role {self.role!r} with learn=True: only what the assistant says can be learnt"
            )
        for call in self.tool_calls:
            arguments_of(call)


@dataclass(frozen=True)
class Example:
    """An example of a source: a conversation, or plain text (`of_text`, `of_completion`).

    Attributes:
        messages: the conversation.
        target: an image that a generator learns to make as the reply.
        name: what errors call it, besides its number in its source.
        tools: JSON schemas of the tools that the assistant may call:
            ``{"type": "function", "function": {"name": "f", "description": "...", "parameters": {...}}}``.
        chat_template_kwargs: values of the chat template's variables, such as ``{"enable_thinking": False}``. They
            override `ChatOptions.template_kwargs`.
    """

    messages: Sequence[Message] = field(default_factory=list)
    target: Image | None = None
    name: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_text(cls, *parts: Part, name: str = "") -> "Example":
        """A text for pretraining, which may contain media. No template is applied; all of it is learnt, and
        the tokenizer's end token after it."""
        return cls([Message("text", parts)], name=name)

    @classmethod
    def of_completion(cls, prompt: Sequence[Part], completion: Sequence[Part], name: str = "") -> "Example":
        """A text, as `of_text` makes it, of which only the completion is learnt. If prompt and completion are lists of
        messages, write one conversation instead, with ``learn=False`` in the messages of the prompt."""
        return cls([Message("text", prompt, learn=False), Message("text", completion)], name=name)

    @property
    def is_text(self) -> bool:
        """Whether it is text, to which no template is applied."""
        return any(message.role == "text" for message in self.messages)

    def check(self) -> None:
        """
        Raises:
            ExampleError: it is empty, or its parts contradict each other.
        """
        if not any(part for message in self.messages for part in (*message.parts, *message.tool_calls)):
            raise ExampleError("is empty: it has no message with anything in it")
        for message in self.messages:
            message.check()
        for tool in self.tools:
            tool_name(tool)
        if not self.is_text:
            return
        beside = {
            "messages of other roles": any(message.role != "text" for message in self.messages),
            "tools": self.tools,
            "chat_template_kwargs": self.chat_template_kwargs,
            "a target": self.target,
        }
        for what, given in beside.items():
            if given:
                raise ExampleError(f"has text without a template and {what}, which belong to a conversation")

    @property
    def media(self) -> list[MediaPart]:
        """The media of the messages, in their order."""
        return [part for message in self.messages for part in message.parts if not isinstance(part, str)]


def arguments_of(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name of the called function, and its arguments as an object.

    Raises:
        ExampleError: the call does not have the form that `Message.tool_calls` describes.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ExampleError(
            f'has the tool call {call!r}: give {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ExampleError(f"has a call of {name} whose arguments are not JSON: {error}") from error
    if not isinstance(arguments, Mapping | None):
        raise ExampleError(f"has a call of {name} whose arguments are no JSON object, but {arguments!r}")
    return name, arguments or {}


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool.

    Raises:
        ExampleError: it is no JSON schema of a tool.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ExampleError(
            f'has the tool {tool!r}: give its JSON schema, {{"type": "function", "function": {{"name": ...}}}}'
        )
    return name
