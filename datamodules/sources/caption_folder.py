"""A source of a folder of images, each with its caption in a file beside it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..errors import ExampleError
from ..example import Example, Image, Message
from ..files import File, Roots, folders_of
from ..limits import Limits
from ..media.modalities import IMAGES
from ..remote import Folder
from .data_files import stamp
from .records import captioned
from .source import Source

SHOWN = 3
"""How many of the files that are left out a warning names."""

log = logging.getLogger(__name__)


class CaptionFolder(Source):
    """Images with captions in text files of the same name, to be described or to be drawn.

    The caption of ``photos/1.png`` is in ``photos/1.txt``. A warning says how many images have no caption, and how many
    captions have no image.
    """

    def __init__(
        self,
        root: Roots,
        prompt: str | None = None,
        task: Literal["describe", "draw"] = "describe",
        limits: Limits = Limits(),
    ) -> None:
        """
        Args:
            root: a folder, which is read with its subfolders; or several folders: only the first is read, and links in
                it may lead into the others.
            prompt: the user's words; for "draw", ``{}`` stands for the caption. ``None``: "Describe the image."; for
                "draw", the caption alone.
            task: "describe" learns the caption from the image; "draw" learns the image from the caption.
            limits: what its examples may have at most.
        """
        if task not in ("describe", "draw"):
            raise ValueError(f'task={task!r}: choose "describe" or "draw"')
        if prompt is None:
            prompt = "{}" if task == "draw" else "Describe the image."
        if task == "draw" and "{}" not in prompt:
            raise ValueError(f"prompt={prompt!r} must have {{}} in it, for the caption that is to be drawn")
        self.roots, self.prompt, self.task, self.limits = folders_of(root, "CaptionFolder"), prompt, task, limits
        self.root = self.roots[0]
        if isinstance(self.root, Folder):
            raise ValueError(f"CaptionFolder: {root} is remote: give a list of its files as JSON, or tars of them")
        found = _Walk(self.roots)
        files = sorted(found.files)
        images = [path for path in files if path.suffix.lower() in IMAGES]
        captions = {path for path in files if path.suffix == ".txt"}
        paired = [path for path in images if path.with_suffix(".txt") in captions]
        # a link to a folder elsewhere counts as one example, which cannot be used
        self.files = [str(path.relative_to(self.root)) for path in sorted([*paired, *found.outside])]
        if not self.files:
            raise ValueError(f"{self.root} has no images with a .txt of the same name beside them")
        used = {path.with_suffix(".txt") for path in paired}
        for what, left_out in (
            (
                "images without a .txt beside them",
                [path for path in images if path.with_suffix(".txt") not in captions],
            ),
            (".txt without an image beside them", sorted(captions - used)),
            (
                "files that are neither images nor .txt",
                [p for p in files if p not in captions and p not in set(images)],
            ),
            ("links to folders that are read under another name", found.again),
        ):
            if left_out:
                shown = ", ".join(str(path.relative_to(self.root)) for path in left_out[:SHOWN])
                more = ", ..." * (len(left_out) > SHOWN)
                log.warning("%s: left out %d %s: %s%s", self.root, len(left_out), what, shown, more)

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
            self.limits.check_record(text.seek(0, os.SEEK_END), f"({file}) its caption")
            text.seek(0)
            try:
                caption = text.read().decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ExampleError(f"({file}) has a caption that is not valid UTF-8: {error}") from error
        if self.task == "draw":
            return Example([Message("user", [self.prompt.replace("{}", caption)])], image, name=file)
        return captioned([image], self.prompt, caption, file)


class _Walk:
    """Finds the files in a folder and its subfolders, including linked ones. Each folder is read once, whatever links
    lead to it, and none is read outside of the roots, where a link might lead to the whole disk.

    Attributes:
        files: the files.
        outside: links to folders outside of the roots.
        again: links to folders that are read under another name.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.files, self.outside, self.again = list[Path](), list[Path](), list[Path]()
        self._allowed, self._seen = [folder.resolve() for folder in roots], set[Path]()
        self._read(roots[0])

    def _read(self, folder: Path) -> None:
        place = folder.resolve()
        if place in self._seen:
            self.again.append(folder)
        elif not any(place.is_relative_to(root) for root in self._allowed):
            self.outside.append(folder)
        elif folder.is_dir():
            self._seen.add(place)
            entries = sorted(folder.iterdir())
            self.files += [path for path in entries if not path.is_dir()]
            for path in sorted((path for path in entries if path.is_dir()), key=Path.is_symlink):  # links last
                self._read(path)
