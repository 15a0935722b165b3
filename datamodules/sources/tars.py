"""A source of samples in uncompressed tar files, as WebDataset writes them.

Members are read in place: reading a sample reads no bytes of other samples.
"""

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ExampleError
from ..example import Example
from ..files import File
from ..limits import Limits
from ..media.modalities import MODALITIES
from .data_files import matching, name_of_all, stamp
from .records import DESCRIBE, Records, media_keys
from .source import Source
from .tar_index import Member, TarIndex


class WebDatasetTars(Source):
    """Uncompressed tar files whose members share a name per sample: ``000.jpg``, ``000.txt`` or ``000.json``.

    A ``.txt`` member is the caption of the media members. A ``.json`` member is a record as of `Records`, in whose
    messages ``<image>``, ``<video>`` and so on stand for the media members in the order of their names.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        prompt: str = DESCRIBE,
        ignore: Sequence[str] = (),
        link_roots: Sequence[str] = (),
        limits: Limits = Limits(),
        index_dir: str | Path = "~/.cache/bigmac_lightning",
    ) -> None:
        """
        Args:
            paths: of tar files; or a pattern such as ``shards/*.tar`` or ``shards/{000..199}.tar``; or their folder.
                They may be remote, such as ``s3://bucket/*.tar``, if the library that fsspec wants for it is installed
                (s3fs).
            prompt: the user's words for samples that are only a caption.
            ignore: suffixes of members, such as "cls" or "json", and keys of ``.json`` members that are left out.
                Other suffixes and keys that are not known are refused.
            link_roots: folders into which matches of a pattern may be links, besides the pattern's own folder.
            limits: what its examples may have at most.
            index_dir: folder in which it is kept where the members of large tars lie, so that only the first run reads
                all of their headers.
        """
        self.paths, self.ignore, self.limits = (
            matching(paths, "WebDatasetTars", link_roots, ".tar"),
            tuple(ignore),
            limits,
        )
        self.records = Records((), self.ignore, prompt)
        self._left_out = {suffix.removeprefix(".").lower() for suffix in self.ignore}
        self._index = TarIndex.of(self.paths, Path(index_dir).expanduser())

    @property
    def name(self) -> str:
        return name_of_all(self.paths)

    def __len__(self) -> int:
        return len(self._index)

    def fingerprint(self) -> str:
        return stamp(self.paths)

    def identity(self) -> str:
        own = {name: value for name, value in vars(self).items() if name != "_index"}
        return hashlib.sha256(pickle.dumps((type(self).__qualname__, len(self), own))).hexdigest()

    def __getitem__(self, index: int) -> Example:
        path, key, members = self._index[index]
        name = f"{path}: {key}"
        try:
            record = self._record(path, key, members)
            return self.records.example(record, name)
        except ValueError as error:
            reason = error if isinstance(error, ExampleError) else f"has text that cannot be read: {error}"
            raise ExampleError(f"({name}) {reason}") from error

    def _record(self, path: str, key: str, members: Sequence[Member]) -> dict[str, Any]:
        """The record that the members of a sample make together."""
        media: dict[str, list[File]] = {}
        plural = {ending: f"{m.name}s" for m in MODALITIES.values() for ending in m.endings}
        texts: dict[str, str] = {}
        for suffix, offset, length in members:
            kind = suffix.rsplit(".", 1)[-1].lower()
            if kind in self._left_out or suffix.removeprefix(".").lower() in self._left_out:
                continue
            if offset < 0:
                raise ExampleError(f"has {suffix} that is no file, and no link to one of this tar")
            file = File.inside(path, key + suffix, offset, length)
            if f".{kind}" in plural:
                media.setdefault(plural[f".{kind}"], []).append(file)
            elif kind not in ("txt", "json"):
                raise ExampleError(f"has {suffix}, which is not known here: name {kind!r} in ignore to leave it out")
            elif kind in texts:
                raise ExampleError(f"has more than one .{kind}")
            else:
                self.limits.check_record(length, suffix)
                texts[kind] = file.open().read().decode("utf-8-sig")
        try:
            record: Any = json.loads(texts["json"]) if "json" in texts else {}
        except RecursionError as error:
            raise ExampleError("has .json with objects or lists that are nested too deep to be read") from error
        if not isinstance(record, Mapping):
            raise ExampleError(f"has .json that is no object, but {record!r}")
        record = {key: value for key, value in record.items() if value is not None and key not in self.ignore}
        if named := [key for key in media_keys() if record.get(key)]:
            raise ExampleError(f"has .json with {', '.join(named)}: its media are the members; name it in ignore")
        if "txt" in texts:
            caption = texts["txt"].strip()
            if str(record.get("caption", caption)).strip() != caption:
                raise ExampleError('has a .txt and another "caption" in its .json: name one of them in ignore')
            record["caption"] = caption
        if not record:
            raise ExampleError("has neither a conversation nor a caption")
        return {**record, **media}
