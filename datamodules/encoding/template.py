"""Applies a chat template of the transformers library to messages, and finds out what the template can write.

Templates differ in what they accept (lists of parts or strings; arguments of tool calls as objects or as text) and in
what they leave out. Both are found out by rendering small conversations.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ExampleError, reason_of
from ..example import Example, MediaPart, Message, arguments_of, tool_name
from ..media.modalities import modality_of

Turn = dict[str, Any]
Mark = Callable[[str, int, str], str]
"""Changes a text. It gets the text, the number of its message, and its kind: "content", "reasoning", "name" or
"argument"."""

PROBE = "probe7probe"
"""A text that no template contains."""
SERIALIZED = re.compile(r"""\\?['"]type\\?['"]\s*:""")
"""A part of the text of a list of parts that a template wrote as JSON or as Python does."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SEARCH = re.compile(r"""(?:startswith|endswith|split|partition)\(\s*(?:'([^'\n]{2,})'|"([^"\n]{2,})")""")
"""An expression by which a template splits a text, or looks for a string in it."""


def _unmarked(text: str, number: int, kind: str) -> str:
    return text


@dataclass(frozen=True)
class ChatTemplate:
    """Applies the template of a tokenizer or processor.

    Attributes:
        tokenizer: a tokenizer, with a chat template unless one is given.
        processor: the processor around it, if there is one; it then applies the template.
        given: a template that is used instead of theirs.
        variables: values of the template's variables in all examples.
        tokens: by modality, the token for an item in a text, if the template accepts only strings.
    """

    tokenizer: Any
    tokens: Mapping[str, str]
    processor: Any = None
    given: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    # -- messages ------------------------------------------------------------------------------------------------------

    def turns(self, messages: Sequence[Message], mark: Mark = _unmarked) -> list[Turn]:
        """Messages in the form that the template accepts.

        Args:
            mark: is applied to each text in them.
        """
        return [self._turn(i, message, mark) for i, message in enumerate(messages)]

    def _turn(self, number: int, message: Message, mark: Mark) -> Turn:
        turn: Turn = {"role": message.role, "content": self._content(number, message, mark)}
        if message.reasoning_content is not None:
            turn["reasoning_content"] = mark(message.reasoning_content, number, "reasoning")
        if message.tool_calls:
            turn["tool_calls"] = [self._call(number, call, mark) for call in message.tool_calls]
        if message.name is not None:
            turn["name"] = message.name
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        return turn

    def _content(self, number: int, message: Message, mark: Mark) -> Any:
        if not message.parts:
            return ""
        is_text = all(isinstance(part, str) for part in message.parts)
        if not self._takes_parts or (self._takes_strings_alike and (is_text or not self._writes_all(message))):
            texts = [
                mark(part, number, "content") if isinstance(part, str) else self.token(part) for part in message.parts
            ]
            return "".join(texts)
        content: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": mark(part, number, "content")})
            else:
                content.append({"type": modality_of(part).name})
        return content

    def token(self, item: MediaPart) -> str:
        """The token for an item in a text."""
        return self.tokens[modality_of(item).name]

    def _call(self, number: int, call: Mapping[str, Any], mark: Mark) -> Turn:
        name, given = arguments_of(call)
        arguments: Any = _each_text(given, lambda text: mark(text, number, "argument"))
        if self._takes_arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {**call["function"], "name": mark(name, number, "name"), "arguments": arguments}
        return {"type": "function", **call, "function": function}

    # -- text ----------------------------------------------------------------------------------------------------------

    def render(self, turns: Sequence[Turn], reply: bool, example: Example | None = None) -> str:
        """The text of a conversation.

        Args:
            reply: whether the text ends with what asks the assistant for a reply.
            example: the example whose tools and variables are used.

        Raises:
            ExampleError: the template refuses the conversation.
        """
        writer = self.tokenizer if self.processor is None else self.processor
        tools, variables = self._surroundings(example)
        try:
            return writer.apply_chat_template(
                list(turns),
                tools=tools,
                chat_template=self.given,
                tokenize=False,
                add_generation_prompt=reply,
                **variables,
            )
        except Exception as error:  # a template may raise anything
            raise _refused(error) from error

    def marked_generation(
        self, turns: Sequence[Turn], reply: bool, example: Example
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The text, and the runs of it that the template marks by ``{% generation %}``; ``None``: it marks none.

        Raises:
            ExampleError: the template refuses the conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        tools, variables = self._surroundings(example)
        source = self.source(bool(tools))
        if not source:
            raise ExampleError("is a conversation, and the tokenizer has no chat template: set chat.template")
        if not GENERATION.search(source):
            return self.render(turns, reply, example), None
        names = {**self.tokenizer.special_tokens_map, **variables}
        given: dict[str, Any] = {"tools": tools, "chat_template": source, "add_generation_prompt": reply, **names}
        try:
            made: Any = render_jinja_template([list(turns)], return_assistant_tokens_mask=True, **given)
        except Exception as error:
            raise _refused(error) from error
        [text], [runs] = made
        if self.processor is not None and text != self.render(turns, reply, example):
            raise ExampleError("is written differently by the processor and by the template that marks what is learnt")
        return text, [(start, stop) for start, stop in runs if start < stop]

    def _surroundings(self, example: Example | None) -> tuple[list[Any] | None, dict[str, Any]]:
        if example is None:
            return None, dict(self.variables)
        return list(example.tools) or None, {**self.variables, **example.chat_template_kwargs}

    def source(self, tools: bool = False) -> str:
        """The text of the template. A tokenizer may have another template for conversations with tools."""
        if not self.given and not self.tokenizer.chat_template:
            return ""
        return self.tokenizer.get_chat_template(self.given, [{}] if tools else None)

    # -- what it can write ---------------------------------------------------------------------------------------------

    def fault(self) -> str:
        """Why it cannot write a conversation of two messages; empty: it can, or there is no template."""
        if not self.source():
            return ""
        reason = ""
        for content in ([{"type": "text", "text": PROBE}], PROBE):
            try:
                text = self.render([{"role": role, "content": content} for role in ("user", "assistant")], False)
            except ExampleError as error:
                reason = str(error).replace("is refused by the chat template", "refuses a conversation", 1)
            else:
                if PROBE in text:
                    return ""
                reason = "leaves out what is said"
        return reason

    def refused_variable(self, variables: Iterable[str]) -> str:
        """The first variable that the template does not have, and why it is refused; empty: all can be set."""
        writer = self.tokenizer if self.processor is None else self.processor
        taken = {"messages", *inspect.signature(writer.apply_chat_template).parameters} - {"kwargs"}
        for name in variables:
            if name in taken:
                return f"{name!r}, which cannot be set there"
            if not re.search(rf"\b{re.escape(name)}\b", self.source() + self.source(True)):
                return f"{name!r}, but the chat template has no such variable"
        return ""

    def check_tools(self, turns: Sequence[Turn], reply: bool, example: Example) -> None:
        """Check that the template writes all tools, by giving them names that nothing else in the conversation has.

        Args:
            turns, reply: see `render`.

        Raises:
            ExampleError: the template leaves a tool out.
        """
        if not example.tools:
            return
        text = self.render(turns, reply, replace(example, tools=[_renamed(*tool) for tool in enumerate(example.tools)]))
        left_out = [tool_name(tool) for i, tool in enumerate(example.tools) if f"{PROBE}{i}x" not in text]
        if left_out:
            raise ExampleError(f"has tools, and the chat template leaves them out: {', '.join(left_out)}")

    @cached_property
    def ordinary(self) -> str:
        """The text of a conversation of three messages; empty if the template refuses it."""
        texts = [self._exchange(PROBE), self._exchange([{"type": "text", "text": PROBE}])]
        return texts[self._takes_parts and not self._takes_strings_alike]

    @cached_property
    def ordinary_reply(self) -> str:
        """The text of a conversation that ends with a reply, which is `PROBE`; empty if the template refuses it."""
        turns = [("user", self._text("a")), ("assistant", self._text(PROBE))]
        return self._tried([{"role": role, "content": content} for role, content in turns])

    @cached_property
    def looked_for(self) -> tuple[str, ...]:
        """The strings that the template looks for at the ends of texts, or splits them at, such as ``</think>``; the
        longest first."""
        found: set[str] = set()
        for match in SEARCH.finditer(self.source() + self.source(True)):
            text = next(group for group in match.groups() if group).replace("\\n", "\n")
            if not text.isspace() and not text.isidentifier():
                found |= {text, text.replace("</", "<").replace("[/", "["), re.sub(r"^([<\[])(?!/)", r"\1/", text)}
        return tuple(sorted(found, key=len, reverse=True))

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether the template writes reasoning, at least that of the last reply."""
        turns = [{"role": "user", "content": self._text("a")}, {"role": "assistant", "content": self._text("b")}]
        turns[-1]["reasoning_content"] = PROBE
        return PROBE in self._tried(turns)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes the texts in lists of parts. Others write the lists as JSON, or nothing."""
        text = self._exchange([{"type": "text", "text": PROBE}])
        return PROBE in text and not SERIALIZED.search(text)

    def _writes_all(self, message: Message) -> bool:
        """Whether the template writes something for the media of a message in a list of parts. Those for text only
        leave them out."""
        return all(self._writes(modality_of(part).name) for part in message.parts if not isinstance(part, str))

    def _writes(self, modality: str) -> bool:
        if modality not in self._written:
            text = {"type": "text", "text": PROBE}
            both = ([{"role": "user", "content": [*item, text]}] for item in ([{"type": modality}], []))
            with_item, without = map(self._tried, both)
            self._written[modality] = with_item not in ("", without)
        return self._written[modality]

    @cached_property
    def _written(self) -> dict[str, bool]:
        """By modality, what `_writes` has found."""
        return {}

    @cached_property
    def _takes_strings_alike(self) -> bool:
        """Whether the template writes the same for a string and for a list with one text."""
        return self._exchange(PROBE) == self._exchange([{"type": "text", "text": PROBE}])

    @cached_property
    def _takes_arguments_as_text(self) -> bool:
        """Whether the arguments of a tool call must be JSON text. Templates refuse arguments in the other form."""
        for arguments in ({"a": PROBE}, json.dumps({"a": PROBE})):
            call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": arguments}}
            turns = [{"role": "user", "content": self._text("a")}]
            if PROBE in self._tried([*turns, {"role": "assistant", "content": "", "tool_calls": [call]}]):
                return isinstance(arguments, str)
        return False

    def _text(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._takes_parts and not self._takes_strings_alike else text

    def _exchange(self, content: Any) -> str:
        return self._tried([{"role": role, "content": content} for role in ("user", "assistant", "user")])

    def _tried(self, turns: Sequence[Turn]) -> str:
        try:
            return self.render(turns, False)
        except ExampleError:
            return ""


def read_template(given: str | Path) -> str:
    """The text of a chat template.

    Args:
        given: the text, or the path of its file.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(given, str) and "{" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"chat.template={str(given)!r} is neither a template nor the path of a file with one")
    return path.read_text("utf-8-sig")


def _renamed(number: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    name = f"{PROBE}{number}x"
    return {**tool, "function": {**tool["function"], "name": name}} if "function" in tool else {**tool, "name": name}


def _refused(error: Exception) -> ExampleError:
    return ExampleError(f"is refused by the chat template: {reason_of(error)}")


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """JSON data with every text in it changed, except keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(item, change) for item in value]
    return value
