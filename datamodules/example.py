"""The one schema that all sources return: an example is a list of messages whose parts are text, images and videos.

Nothing is opened or decoded here: an image is a place where bytes are, and its size if that is known already.
Knows nothing of tokenizers, models or ranks.
"""

import io
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

ROLES = ("system", "developer", "user", "assistant", "tool", "text")


Roots = str | Path | Sequence[str | Path]
"""A folder that media lie in, or several: paths are relative to the first, and links may lead into all of them."""


class ExampleError(ValueError):
    """An example that cannot be trained on; `on_error` decides what becomes of it."""


@dataclass(frozen=True)
class File:
    """Bytes somewhere: a file, a part of one, or whatever `opener` opens.

    Attributes:
        name: what errors call it.
        opener: makes a seekable binary stream.
    """

    name: str
    opener: Callable[[], BinaryIO]

    @classmethod
    def at(cls, path: str | Path, root: Roots | None = None) -> "File":
        """A file on disk.

        Args:
            path: relative to `root`, or to the first of several.
            root: folders; in one of them the file must lie, symbolic links resolved.

        Raises:
            ExampleError: the path leads out of them, or nowhere.
        """
        if root is None:
            return cls(str(path), partial(_open_file, str(path)))
        roots = roots_of(root)
        whole = roots[0] / path
        try:
            place = whole.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise ExampleError(f"{str(path)!r} leads nowhere: {error}") from error
        if not any(place.is_relative_to(folder.resolve()) for folder in roots):
            allowed = ", ".join(str(folder) for folder in roots)
            raise ExampleError(
                f"{str(path)!r} leads out of the media root: it is {place}, and only files below {allowed} are read. "
                f"If it is meant, give media_root as a list, with {place.parent} behind {roots[0]}"
            )
        return cls(str(whole), partial(_open_file, str(place)))

    @classmethod
    def inside(cls, path: str | Path, name: str, offset: int, length: int) -> "File":
        """A run of bytes in a file, as a member of an uncompressed tar is."""
        return cls(f"{path}: {name}", partial(_read_part, str(path), offset, length))

    @classmethod
    def lazy(cls, name: str, load: Callable[[], bytes]) -> "File":
        """What a function gives when it is called."""
        return cls(name, partial(_read_lazily, load))

    def open(self) -> BinaryIO:
        return self.opener()


def roots_of(given: Roots) -> tuple[Path, ...]:
    """
    Raises:
        ValueError: there is none.
    """
    roots = (Path(given),) if isinstance(given, str | Path) else tuple(Path(folder) for folder in given)
    if not roots:
        raise ValueError("media_root is an empty list: give one folder at least")
    return roots


def _open_file(path: str) -> BinaryIO:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise ValueError("it is a folder, a pipe or a device, and no file")
    return open(path, "rb")


def _read_part(path: str, offset: int, length: int) -> BinaryIO:
    with open(path, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(length))


def _read_lazily(load: Callable[[], bytes]) -> BinaryIO:
    return io.BytesIO(load())


@dataclass(frozen=True)
class Size:
    """What has to be known of an image or video before it is decoded.

    Attributes:
        height, width: pixels, as displayed.
        frames: 1 for an image.
        seconds: duration of a video.
    """

    height: int
    width: int
    frames: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Image:
    """An image as part of a message, or to be made by a generator.

    Attributes:
        file: where it is.
        size: if the source knows it; else the file's header is read once, when the source is indexed.
    """

    file: File
    size: Size | None = None


@dataclass(frozen=True)
class Video:
    """A video as part of a message; attributes as of `Image`."""

    file: File
    size: Size | None = None


Part = str | Image | Video


@dataclass(frozen=True)
class Message:
    """One turn, with what the formats in use say of it.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool"; or "text": of no one, written without a template.
        parts: texts, images and videos in their order; none where an assistant only calls tools.
        reasoning_content: what the assistant thinks before it speaks.
        tool_calls: of the assistant: ``{"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}``.
            Arguments may be an object or its JSON text; type and id may be missing.
        name: of the tool that a "tool" message is the result of.
        tool_call_id: of the call that it is the result of.
        learn: whether the model learns it; ``None``: as the DataModule's `learn` says, and a "text" always. Only what
            the assistant says and texts can be learnt.
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
            ExampleError: a role is not known, or something is given that a message of its role cannot have.
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
    """What a source returns: a conversation, or plain text (`of_text`, `of_completion`).

    Attributes:
        messages: the conversation.
        target: an image that a generator learns to make as the reply to it.
        name: what errors call it; empty: its number in its source.
        tools: JSON schemas of the tools that the assistant may call:
            ``{"type": "function", "function": {"name": "f", "description": "...", "parameters": {...}}}``.
        chat_template_kwargs: variables of the chat template for this example, such as ``{"enable_thinking": False}``;
            before those of the DataModule.
    """

    messages: Sequence[Message] = field(default_factory=list)
    target: Image | None = None
    name: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_text(cls, *parts: Part, name: str = "") -> "Example":
        """Text for pretraining, with images and videos in it if there are any: no template is applied, all of it is
        learnt, and the tokenizer's end token behind it."""
        return cls([Message("text", parts)], name=name)

    @classmethod
    def of_completion(cls, prompt: Sequence[Part], completion: Sequence[Part], name: str = "") -> "Example":
        """As `of_text`, of which the completion alone is learnt. A prompt and a completion that are lists of messages
        are one conversation, with ``learn=False`` in those of the prompt."""
        return cls([Message("text", prompt, learn=False), Message("text", completion)], name=name)

    @property
    def is_text(self) -> bool:
        """Whether no template is applied."""
        return any(message.role == "text" for message in self.messages)

    def check(self) -> None:
        """
        Raises:
            ExampleError: it is empty, or what is given does not go together.
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
    def media(self) -> list[Image | Video]:
        """Images and videos of the messages, in their order."""
        return [part for message in self.messages for part in message.parts if not isinstance(part, str)]


def arguments_of(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The name of the function that is called, and its arguments as an object.

    Raises:
        ExampleError: it is no call as `Message.tool_calls` tells it.
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
    """
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
