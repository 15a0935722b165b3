"""Ready-made sources of the formats in use. Each gives `Example`s; none opens a media file.

Paths in data files are read below a media root only; nothing is unpickled. A record that makes no sense raises
`ExampleError` when it is asked for, so that one bad line does not hide the others.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .conversation import places_of
from .example import Example, ExampleError, File, Image, Message, Roots, Size, Video, roots_of
from .records import check_columns, example_of_record
from .source import Source, stamp

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGES += (".avif", ".heic", ".heif", ".jp2", ".pgm", ".ppm")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".flv", ".m4v", ".mpeg", ".mpg", ".ts", ".wmv")
MAX_LINKS = 40
"""That lead from one to the next."""


class _FileSource(Source):
    """Of one data file with media below a root, or several."""

    def __init__(self, path: str | Path, media_root: Roots | None, ignore: Sequence[str]) -> None:
        self.path, self.ignore = Path(path), tuple(ignore)
        self.media_roots = roots_of(self.path.parent if media_root is None else media_root)

    @property
    def name(self) -> str:
        return str(self.path)

    def fingerprint(self) -> str:
        return stamp([self.path])

    def identity(self) -> str:
        return repr((type(self).__qualname__, str(self.path.resolve()), resolved(self.media_roots), self.ignore))

    def _media(self, kind: type[Image] | type[Video], given: Any) -> Any:
        return media_at(kind, given, self.media_roots)


class MessagesJSONL(_FileSource):
    """One JSON object per line, as ms-swift and LLaMA-Factory read them; further keys are those of `Conversation`::

        {"messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "A cat."}],
         "images": ["cats/1.png"], "videos": [], "target": null}

    ``<image>`` and ``<video>`` stand for the next entry of `images` and `videos`, which are paths below the media root
    or objects with "path", "height" and "width". `target`, if there, is an image that a generator learns to make.
    """

    def __init__(self, path: str | Path, media_root: Roots | None = None, ignore: Sequence[str] = ()) -> None:
        """
        Args:
            path: of the file.
            media_root: folder of its media, or several, as of `Roots`; ``None``: the folder of the file.
            ignore: keys of its records that are left out; others that are not known are refused.
        """
        super().__init__(path, media_root, ignore)
        starts, numbers, start = [], [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    starts.append((start, len(line)))
                    numbers.append(number)
                start += len(line)
        self._spans, self._numbers = np.array(starts, dtype=np.int64).reshape(-1, 2), np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        start, length = self._spans[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(length)
        where = f"line {self._numbers[index]}"
        try:
            record = json.loads(line.decode("utf-8"))
            return self._read(record, where)
        except UnicodeDecodeError as error:
            raise ExampleError(f"({where}) is not valid UTF-8: {error}") from error
        except json.JSONDecodeError as error:
            raise ExampleError(f"({where}) is not JSON: {error}") from error
        except ExampleError as error:
            raise ExampleError(f"({where}) {error}") from error

    def _read(self, record: Any, name: str) -> Example:
        images = [self._media(Image, path) for path in _listed(record, "images")]
        videos = [self._media(Video, path) for path in _listed(record, "videos")]
        target = None if record.get("target") is None else self._media(Image, record["target"])
        used = ("images", "videos", "target", *self.ignore)
        return example_of_record(record, images, videos, target, name, used)


class LlavaJSON(_FileSource):
    """A JSON list of objects, as LLaVA's data come::

    [{"id": "1", "image": "cats/1.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                           {"from": "gpt", "value": "A cat."}]}]
    """

    def __init__(self, path: str | Path, media_root: Roots | None = None, ignore: Sequence[str] = ()) -> None:
        """
        Args:
            path: of the file.
            media_root: folder of its media, or several, as of `Roots`; ``None``: the folder of the file.
            ignore: keys of its records that are left out; others that are not known are refused.
        """
        super().__init__(path, media_root, ignore)
        records = json.loads(self.path.read_text("utf-8"))
        if not isinstance(records, list):
            raise ValueError(f"{self.path} must be a JSON list of objects with conversations")
        self._records: list[Any] = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        images = [self._media(Image, path) for path in _listed(record, "image")]
        videos = [self._media(Video, path) for path in _listed(record, "video")]
        used = ("id", "image", "video", *self.ignore)
        return example_of_record(record, images, videos, name=str(record.get("id", "")), used=used)


class CaptionFolder(Source):
    """Images with a text file of the same name beside each: to be described, or to be drawn.

    ``photos/1.png`` goes with ``photos/1.txt``.
    """

    def __init__(
        self, root: Roots, prompt: str = "Describe the image.", task: Literal["describe", "draw"] = "describe"
    ) -> None:
        """
        Args:
            root: folder, read with all that are in it; or several: the first is read, and links in it may lead into
                the others.
            prompt: the user's words; for "draw", ``{}`` stands for the caption.
            task: "describe" learns the caption from the image; "draw" the image from the caption.
        """
        self.roots, self.prompt, self.task = roots_of(root), prompt, task
        self.root = self.roots[0]
        files = sorted(path for path in _files(self.root) if path.suffix.lower() in IMAGES)
        self.files = [str(path.relative_to(self.root)) for path in files if path.with_suffix(".txt").exists()]
        if not self.files:
            raise ValueError(f"{self.root} has no images with a .txt of the same name beside them")

    @property
    def name(self) -> str:
        return str(self.root)

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        paths = [self.root / file for file in self.files]
        return stamp([*paths, *(path.with_suffix(".txt") for path in paths)])

    def __getitem__(self, index: int) -> Example:
        file = self.files[index]
        image = Image(File.at(file, self.roots))
        with File.at(str(Path(file).with_suffix(".txt")), self.roots).open() as text:
            caption = text.read().decode("utf-8-sig").strip()
        if self.task == "draw":
            request = self.prompt.format(caption) if "{}" in self.prompt else caption
            return Example([Message("user", [request])], image, name=file)
        return Example([Message("user", [image, self.prompt]), Message("assistant", [caption])], name=file)


class WebDatasetTars(Source):
    """Uncompressed tar files whose members share a name per sample: ``000.jpg``, ``000.txt`` or ``000.json``.

    A ``.json`` member may hold "messages" or "conversations" with ``<image>`` and ``<video>`` placeholders for the
    media members in the order of their names. Else the ``.txt`` is a caption. Members are read in place: opening a
    sample reads its own bytes and no others.
    """

    def __init__(
        self, paths: str | Sequence[str], prompt: str = "Describe what you see.", ignore: Sequence[str] = ()
    ) -> None:
        """
        Args:
            paths: of tar files, or a pattern such as ``shards/*.tar``.
            prompt: the user's words where there is only a caption.
            ignore: keys of ``.json`` members with a conversation that are left out; others that are not known are
                refused.
        """
        if isinstance(paths, str):
            pattern = Path(paths)
            paths = sorted(str(path) for path in pattern.parent.glob(pattern.name))
        if not paths:
            raise ValueError("WebDatasetTars: there are no such tar files")
        self.paths, self.prompt, self.ignore = list(paths), prompt, tuple(ignore)
        self._samples: list[tuple[str, str, list[tuple[str, int, int]]]] = []
        for path in self.paths:
            self._samples += _members(path)

    @property
    def name(self) -> str:
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"

    def __len__(self) -> int:
        return len(self._samples)

    def fingerprint(self) -> str:
        return stamp(list(self.paths))

    def __getitem__(self, index: int) -> Example:
        path, key, members = self._samples[index]
        name = f"{path}: {key}"
        images, videos, texts = [], [], {}
        for suffix, offset, length in members:
            if offset < 0:
                raise ExampleError(f"({name}) has {suffix} that is no file, and no link to one of this tar")
            file = File.inside(path, key + suffix, offset, length)
            ending = "." + suffix.rsplit(".", 1)[-1].lower()
            if ending in IMAGES:
                images.append(Image(file))
            elif ending in VIDEOS:
                videos.append(Video(file))
            elif ending in (".txt", ".json"):
                texts[ending] = file.open().read()
        try:
            record = json.loads(texts[".json"].decode("utf-8")) if ".json" in texts else {}
            caption = texts.get(".txt", b"").decode("utf-8").strip()
        except ValueError as error:
            raise ExampleError(f"({name}) has text that cannot be read: {error}") from error
        if isinstance(record, Mapping) and (record.get("messages") or record.get("conversations")):
            return example_of_record(record, images, videos, name=name, used=self.ignore)
        caption = caption or str(record.get("caption", ""))
        if not caption:
            raise ExampleError(f"({name}) has neither a conversation nor a caption")
        return Example([Message("user", [*images, *videos, self.prompt]), Message("assistant", [caption])], name=name)


class HFDataset(Source):
    """Rows of whatever the `datasets` library reads (Parquet, Arrow, its own formats), memory-mapped.

    Columns: "messages" or "conversations" with ``<image>`` placeholders, and "images" or "image" whose entries hold
    their bytes, or paths below the media root.
    """

    def __init__(
        self,
        path: str,
        data_files: str | Sequence[str] | None = None,
        split: str = "train",
        media_root: Roots = ".",
        ignore: Sequence[str] = (),
    ) -> None:
        """
        Args:
            path, data_files, split: as of `datasets.load_dataset`: ``HFDataset("parquet", "shards/*.parquet")``.
            media_root: folder of media given by path, or several, as of `Roots`.
            ignore: columns that are left out; others that are not known are refused.
        """
        import datasets

        files = data_files if data_files is None or isinstance(data_files, str) else list(data_files)
        rows: Any = datasets.load_dataset(path, data_files=files, split=split)
        self.media_roots = roots_of(media_root)
        self._column = next((name for name in ("images", "image") if name in rows.column_names), None)
        self._turns = next((name for name in ("messages", "conversations") if name in rows.column_names), None)
        if self._turns is None:
            raise ValueError(f"the rows have columns {rows.column_names}: one of messages, conversations is needed")
        self._rows = rows = undecoded(rows)
        self.ignore = tuple(ignore)
        left_out = (self._column, *ignore)
        self._texts = rows.select_columns([name for name in rows.column_names if name not in left_out])
        self._label = f"{path} {data_files or ''}".strip()

    @property
    def name(self) -> str:
        return self._label

    def __len__(self) -> int:
        return len(self._rows)

    def fingerprint(self) -> str:
        return self._rows._fingerprint

    def identity(self) -> str:
        return repr((type(self).__qualname__, self._label, resolved(self.media_roots), self.ignore))

    def __getitem__(self, index: int) -> Example:
        row = self._texts[index]
        check_columns(row)
        wanted = sum(place == "image" for turn in row[self._turns] or () for place in places_of(turn))
        images = [
            Image(File.lazy(f"{self.name}, row {index}, image {k}", partial(self._read, index, k)))
            for k in range(wanted)
        ]
        return example_of_record(row, images, [], name=f"row {index}")

    def _read(self, index: int, number: int) -> bytes:
        given = self._rows[index][self._column]
        items = given if isinstance(given, list) else [given]
        if number >= len(items):
            raise ExampleError(f"has {len(items)} images, fewer than <image> placeholders")
        return content_of(items[number], self.media_roots)


def media_at(kind: type[Image] | type[Video], given: Any, roots: Roots) -> Any:
    """An image or video below the media roots.

    Args:
        given: its path, or ``{"path": "a.png", "height": 64, "width": 64}``; of a video, the path alone.

    Raises:
        ExampleError: it is neither; or the path leads elsewhere.
    """
    path, size = given, None
    if isinstance(given, Mapping):
        path = given.get("path")
        told = {key: value for key, value in given.items() if key != "path" and value is not None}
        if kind is Image and told.keys() == {"height", "width"} and all(type(side) is int for side in told.values()):
            size = Size(**told)
        elif told:
            most = 'only its "path", "height" and "width", two integers' if kind is Image else 'only its "path"'
            raise ExampleError(f"tells {told} of the {kind.__name__.lower()} {path!r}: {most} can be given")
    if not isinstance(path, str):
        raise ExampleError(f"names a file by {given!r}: give its path below {roots_of(roots)[0]}")
    return kind(File.at(path, roots), size)


def undecoded(rows: Any) -> Any:
    """A dataset of the `datasets` library whose images stay bytes until their owner asks for them."""
    import datasets

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return rows


def resolved(roots: Sequence[Path]) -> list[str]:
    """What tells them apart from others on disk."""
    return [str(folder.resolve()) for folder in roots]


def content_of(item: Any, media_root: Roots) -> bytes:
    """The bytes of an image of such a dataset: its own, or those of a file below the media root."""
    if isinstance(item, Mapping) and item.get("bytes"):
        return item["bytes"]
    path = item.get("path") if isinstance(item, Mapping) else item
    if not isinstance(path, str):
        raise ExampleError(f"has neither bytes nor a path, but {type(item).__name__}")
    with File.at(path, media_root).open() as file:
        return file.read()


def _listed(record: Any, key: str) -> list[Any]:
    """What a record has under a key: a list, or one thing, or nothing."""
    if not isinstance(record, Mapping):
        raise ExampleError(f"is no JSON object: {record!r}")
    value = record.get(key)
    return [] if value is None else value if isinstance(value, list) else [value]


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """In a folder and in those in it, linked ones as well."""
    place = folder.resolve()
    if place in above or not folder.is_dir():  # a link back, or nothing
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, (*above, place))
        else:
            yield path


def _members(path: str) -> list[tuple[str, str, list[tuple[str, int, int]]]]:
    """(tar, key, [(suffix, offset, length)]) of each sample, in the order of the tar."""
    samples: dict[str, list[tuple[str, int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            files = {posixpath.normpath(member.name): member for member in tar}
            for member in tar:
                if not member.isdir():
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    samples.setdefault(key, []).append((f".{suffix}", *_span(files, member)))
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is not an uncompressed tar: {error}") from error
    return [(path, key, sorted(members)) for key, members in samples.items()]


def _span(files: Mapping[str, tarfile.TarInfo], member: tarfile.TarInfo) -> tuple[int, int]:
    """Offset and length of a member, or of the one that it is a link to; (-1, 0): it is no file of this tar."""
    file: tarfile.TarInfo | None = member
    for _ in range(MAX_LINKS):
        if file is None or not (file.issym() or file.islnk()):
            break
        folder = posixpath.dirname(file.name) if file.issym() else ""
        file = files.get(posixpath.normpath(posixpath.join(folder, file.linkname)))
    return (file.offset_data, file.size) if file is not None and file.isreg() and not file.issparse() else (-1, 0)
