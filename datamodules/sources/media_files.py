"""What data name an image or a video by, and the item that it stands for: a path, a ``data:`` URI, or bytes.

Knows paths and URIs; opens nothing and downloads nothing.
"""

import base64
import re
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from ..example import ExampleError, File, Image, Roots, Size, Video, roots_of

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGES += (".avif", ".heic", ".heif", ".jp2", ".pgm", ".ppm")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".flv", ".m4v", ".mpeg", ".mpg", ".ts", ".wmv")

URI = re.compile("[A-Za-z][A-Za-z0-9+.-]+://")
SHOWN = 40
"""Characters of a ``data:`` URI that errors show."""


def media_at(kind: type[Image] | type[Video], given: Any, roots: Roots, called: str = "its bytes") -> Any:
    """An image or video.

    Args:
        given: its path below the media roots, with or without ``file://``; a ``data:`` URI; its bytes; a `File`; or an
            object: ``{"path": "a.png", "height": 64, "width": 64}``, of a video without a size; or ``{"bytes": ...,
            "path": ...}``, as the `datasets` library has them, whose path counts if there are no bytes.
        roots: folders; empty: no paths are read.
        called: what errors call bytes, which have no name of their own.

    Raises:
        ExampleError: it is none of them; the path leads elsewhere; or it would have to be downloaded.
    """
    size, what = None, kind.__name__.lower()
    if isinstance(given, File):
        return kind(given)
    if isinstance(given, Mapping):
        told = {key: value for key, value in given.items() if key not in ("path", "bytes") and value is not None}
        if kind is Image and told.keys() == {"height", "width"} and all(type(side) is int for side in told.values()):
            size = Size(**told)
        elif told:
            most = 'only its "path", "height" and "width", two integers' if kind is Image else 'only its "path"'
            raise ExampleError(f"tells {told} of the {what} {given.get('path')!r}: {most} can be given")
        given = given.get("path") if given.get("bytes") is None else given["bytes"]
    if isinstance(given, bytes):
        return kind(File.lazy(called, partial(bytes, given)), size)
    if not isinstance(given, str):
        below = "" if roots == () else f" below {roots_of(roots)[0]}"
        raise ExampleError(f"names a file by {given!r}: give its path{below}, a data: URI, or its bytes")
    if given.startswith("data:"):
        return kind(_inline(given, what), size)
    scheme = URI.match(given)
    if scheme and scheme[0].lower() == "file://":
        given = unquote(urlsplit(given).path)
    elif scheme:
        raise ExampleError(f"names the {what} {given!r}: nothing is downloaded. Save it, and give its path")
    if roots == ():
        raise ExampleError(f"names the {what} {given!r}: no files are read but those that come with the record")
    return kind(File.at(given, roots), size)


def _inline(uri: str, what: str) -> File:
    """What a ``data:`` URI holds."""
    head, comma, content = uri.partition(",")
    shown = f"{uri[:SHOWN]}..." if len(uri) > SHOWN else uri
    mime, *options = head.removeprefix("data:").split(";")
    if not comma or "base64" not in options:
        raise ExampleError(f"has the {what} {shown!r}: give data:{what}/...;base64, and the bytes in base64 behind it")
    if mime and not mime.lower().startswith(f"{what}/"):
        raise ExampleError(f"has data of type {mime} as its {what}: {shown!r}")
    return File.lazy(shown, partial(base64.b64decode, content, validate=True))
