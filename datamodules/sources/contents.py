"""The contents of messages as data: where media belong, and which ``<image>`` is ordinary text."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Required, TypedDict

from ..errors import ExampleError
from ..example import MediaPart, Part
from ..files import Roots
from ..media.modalities import MODALITIES
from .media_files import media_at


class TypedPart(TypedDict, total=False):
    """A part of a message. Placeholders in its text are ordinary text. A modality of your own has the same keys under
    its own name, such as "signal" and "signal_url".

    Attributes:
        type: "text"; "image", "video" or "audio", which stands for the next one if it names no file; "image_url",
            "video_url" or "audio_url"; or "input_audio".
        text: the text of a part of type "text".
        image, video, audio, path, url: the file of an item, under one of these keys; see `media_at`.
        base64: the bytes of an item.
        image_url, video_url, audio_url: for parts of these types: ``{"url": ...}``, or the URL alone.
        input_audio: for parts of this type: ``{"data": the bytes in base64, "format": "wav"}``.
    """

    type: Required[str]
    text: str | None
    image: Any
    video: Any
    audio: Any
    path: str | None
    url: str | None
    base64: str | None
    image_url: Mapping[str, Any] | str | None
    video_url: Mapping[str, Any] | str | None
    audio_url: Mapping[str, Any] | str | None
    input_audio: Mapping[str, str]


class Contents:
    """Makes the parts of the messages of one conversation.

    Args:
        items: by modality, the media that placeholders and parts without a file stand for, in their order.
        turns: all messages.
        roots: folders of the files that parts name.

    Raises:
        ExampleError: there is not one placeholder, or part without a file, for each item.
    """

    def __init__(self, items: Mapping[str, Sequence[Any]], turns: Sequence[Mapping[str, Any]], roots: Roots) -> None:
        self._left = {kind: list(given) for kind, given in items.items()}
        self._roots, self._words, self._first = roots, set[str](), list[Part]()
        self._user = next((turn for turn in turns if turn.get("role") == "user"), None)
        for kind, given in self._left.items():
            places = Places.of(kind, turns)
            if places.given + places.learnt == len(given):
                continue
            if places.given == len(given):
                self._words.add(kind)
            elif places.given + places.learnt + places.with_file == 0:
                self._put_first(kind, places)
            else:
                raise ExampleError(
                    f"has {places.given + places.learnt} <{kind}> placeholders for {len(given)} {kind}s. If <{kind}> "
                    'is ordinary text, give the content as parts: {"type": "text", "text": ...} and '
                    f'{{"type": "{kind}"}}'
                )

    def _put_first(self, kind: str, places: "Places") -> None:
        if places.in_parts:
            raise ExampleError(
                f'has <{kind}> in the text of a part, where it is ordinary text: give {{"type": "{kind}"}}'
            )
        if self._user is None:
            raise ExampleError(
                f"has {kind}s and no <{kind}> for them, nor a message of the user that they could begin: write "
                f"<{kind}> where one belongs"
            )
        self._first += self._left[kind]
        self._left[kind] = []

    def parts(self, turn: Mapping[str, Any], where: str) -> list[Part]:
        """The parts of the next message.

        Args:
            where: what errors call the message.
        """
        content = turn.get("content")
        if content is None:
            content = ""
        first = self._first if turn is self._user else []
        if isinstance(content, str):
            return [*first, *self._text(content, _is_learnt(turn))]
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise ExampleError(f"has {where} whose content is neither text nor a list of parts, but {content!r}")
        return [*first, *(self._part(part, where) for part in content)]

    def _text(self, content: str, learnt: bool) -> list[Part]:
        parts: list[Part] = []
        text = ""
        for piece in places().split(content):
            kind = piece[1:-1]
            if not places().fullmatch(piece) or (learnt and kind in self._words):
                text += piece
                continue
            parts += [text, self._left[kind].pop(0)]
            text = ""
        return [part for part in (*parts, text) if part != ""]

    def _part(self, part: Any, where: str) -> Part:
        if isinstance(part, MediaPart):
            return part
        part = _plain(part, where)
        if isinstance(part, Mapping) and isinstance(named := part.get("type"), str) and named not in _types():
            raise ExampleError(
                f"has {where} with a part of type {named!r}: known are {', '.join(_types())}; register(Modality(...)) "
                "adds others"
            )
        given = known(part, _part_keys(), f" in a part of {where}")
        kind, own = _file(given)
        if given.get("type") == "text" and isinstance(given.get("text"), str) and not own:
            return given["text"]
        if kind is None or given.get("text") or len(own) > 1 or not own.keys() <= {*_file_keys(given["type"])}:
            types = " or ".join(f'{{"type": "{name}"}}' for name in MODALITIES)
            raise ExampleError(
                f'has {where} with the part {part!r}: give {{"type": "text", "text": ...}}, {types}, or one of the '
                'latter with its file, under "path" and no other key'
            )
        if not own:
            return self._left[kind].pop(0)
        ((key, value),) = own.items()
        if key == "base64":
            value = f"data:;base64,{value}"
        if key == f"{kind}_url" and isinstance(value, Mapping):
            if set(value) - {"url", "detail"} or value.get("detail", "auto") not in ("auto", None):
                raise ExampleError(f'has {where} with {key} {dict(value)!r}: only its "url" can be given')
            value = value.get("url")
        return media_at(kind, value, self._roots, f"the {kind} in {where}")


@dataclass
class Places:
    """How many places a conversation has for items of a kind.

    Attributes:
        given: number of parts without a file, and of placeholders in messages that are not learnt.
        learnt: number of placeholders in learnt messages.
        with_file: number of parts with a file of their own.
        in_parts: number of placeholders in the texts of parts of messages that are not learnt.
    """

    given: int = 0
    learnt: int = 0
    with_file: int = 0
    in_parts: int = 0

    @classmethod
    def of(cls, kind: str, turns: Sequence[Mapping[str, Any]]) -> "Places":
        places = cls()
        for turn in turns:
            content, learnt = turn.get("content"), _is_learnt(turn)
            if isinstance(content, str):
                number = content.count(f"<{kind}>")
                places.learnt += number * learnt
                places.given += number * (not learnt)
                continue
            for given in content if isinstance(content, Sequence) else ():
                part = _plain(given, "a message")
                of, own = _file(part) if isinstance(part, Mapping) else (None, {})
                places.with_file += isinstance(part, MODALITIES[kind].part) or (of == kind and bool(own))
                places.given += of == kind and not own
                text = part.get("text") if isinstance(part, Mapping) else None
                places.in_parts += not learnt and isinstance(text, str) and f"<{kind}>" in text
        return places


def places() -> re.Pattern[str]:
    """Matches the placeholders of all modalities, each in a group."""
    return _pattern(tuple(modality.placeholder for modality in MODALITIES.values()))


@cache
def _pattern(placeholders: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, placeholders))})")


def _plain(part: Any, where: str) -> Any:
    """A part, where OpenAI's form of a sound is written as those of other media are."""
    if not isinstance(part, Mapping) or part.get("type") != "input_audio":
        return part
    sound = part.get("input_audio")
    if not isinstance(sound, Mapping) or not isinstance(sound.get("data"), str) or sound.keys() - {"data", "format"}:
        raise ExampleError(
            f'has {where} with the part {part!r}: give {{"type": "input_audio", "input_audio": {{"data": the bytes in '
            'base64, "format": "wav"}}'
        )
    return {"type": "audio", "base64": sound["data"]}


def _types() -> tuple[str, ...]:
    """The types of parts."""
    return ("text", *MODALITIES, *(f"{name}_url" for name in MODALITIES))


def _part_keys() -> tuple[str, ...]:
    """The keys of a part."""
    return ("type", "text", *MODALITIES, "path", "url", "base64", *(f"{name}_url" for name in MODALITIES))


def _file_keys(kind: str) -> tuple[str, ...]:
    """The keys by which a part of a type may name its file."""
    return (kind, "path", "url", "base64") if kind in MODALITIES else (kind,)


def known(given: Any, keys: Collection[str], where: str) -> dict[str, Any]:
    """The keys of an object that have a value.

    Raises:
        ExampleError: a key that is not one of these has a value.
    """
    if not isinstance(given, Mapping):
        raise ExampleError(f"is no JSON object{where}: {given!r}")
    unknown = [str(key) for key, value in given.items() if key not in keys and value not in (None, "", [], {}, ())]
    if unknown:
        advice = "" if where else ". A source leaves out what its ignore names"
        raise ExampleError(
            f"has {', '.join(unknown)}{where}, which is not known here; known are {', '.join(keys)}{advice}"
        )
    return {key: value for key, value in given.items() if key in keys and value is not None}


def _is_learnt(turn: Mapping[str, Any]) -> bool:
    """Whether a message may be learnt: it is the assistant's, or text without a template."""
    return turn.get("role") == "assistant" or (turn.get("role") == "text" and turn.get("loss") is not False)


def _file(part: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The modality of a part, and the keys that name its file; empty: it is the next one."""
    given = part.get("type")
    kind = given.removesuffix("_url") if isinstance(given, str) and given in _types() and given != "text" else None
    own = {key: part[key] for key in _part_keys()[2:] if part.get(key) is not None}
    if kind != given and not own:  # an image_url without a URL
        kind = None
    return kind, own
