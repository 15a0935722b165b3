"""The ways in which data name an item of media: paths, ``data:`` URIs and bytes. Nothing is opened or downloaded."""

import base64
import re
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import ExampleError
from ..example import Image, Size
from ..files import File, Roots, roots_of
from ..media.modalities import MODALITIES

URI = re.compile("[A-Za-z][A-Za-z0-9+.-]+://")
SHOWN = 40
"""How many characters of a ``data:`` URI errors show."""


def media_at(name: str, given: Any, roots: Roots, called: str = "its bytes") -> Any:
    """An item of media.

    Args:
        name: its modality.
        given: its path below the media roots, with or without ``file://``; a ``data:`` URI; its bytes; a `File`; or an
            object: ``{"path": "a.png", "height": 64, "width": 64}``, where only images have a size; or ``{"bytes": ...,
            "path": ...}``, as in the `datasets` library, whose path is used if there are no bytes.
        roots: folders of media; empty: paths are refused.
        called: what errors call bytes, which have no name of their own.

    Raises:
        ExampleError: it is none of these; the path leads out of the folders; or it would have to be downloaded.
    """
    size, kind = None, MODALITIES[name].part
    if isinstance(given, File):
        return kind(given)
    if isinstance(given, Mapping):
        others = {key: value for key, value in given.items() if key not in ("path", "bytes") and value is not None}
        if (
            kind is Image
            and others.keys() == {"height", "width"}
            and all(type(side) is int for side in others.values())
        ):
            size = Size(**others)
        elif others:
            most = 'only its "path", "height" and "width", two integers' if kind is Image else 'only its "path"'
            raise ExampleError(f"has {others} for the {name} {given.get('path')!r}: {most} can be given")
        given = given.get("path") if given.get("bytes") is None else given["bytes"]
    if isinstance(given, bytes):
        return kind(File.lazy(called, partial(bytes, given)), size)
    if not isinstance(given, str):
        below = "" if roots == () else f" below {roots_of(roots)[0]}"
        raise ExampleError(f"names a file by {given!r}: give its path{below}, a data: URI, or its bytes")
    if given.startswith("data:"):
        return kind(_inline(given, name), size)
    scheme = URI.match(given)
    if scheme and scheme[0].lower() == "file://":
        given = unquote(urlsplit(given).path)
    elif scheme:
        raise ExampleError(f"names the {name} {given!r}: nothing is downloaded. Save it, and give its path")
    if roots == ():
        raise ExampleError(f"names the {name} {given!r}: no files are read but those that come with the record")
    return kind(File.at(given, roots), size)


def _inline(uri: str, name: str) -> File:
    """The file of a ``data:`` URI."""
    begin = MODALITIES[name].mime
    head, comma, content = uri.partition(",")
    shown = f"{uri[:SHOWN]}..." if len(uri) > SHOWN else uri
    mime, *options = head.removeprefix("data:").split(";")
    if not comma or "base64" not in options:
        raise ExampleError(
            f"has the {name} {shown!r}: give data:{begin or 'application/'}...;base64, followed by a comma and the "
            "bytes in base64"
        )
    if mime and not mime.lower().startswith(begin):
        raise ExampleError(f"has data of type {mime} as its {name}: {shown!r}")
    return File.lazy(shown, partial(base64.b64decode, content, validate=True))
