"""A source of a folder of images, each with its caption in a file beside it."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..errors import ExampleError
from ..example import Example, Image, Message
from ..files import File, Roots, roots_of
from .data_files import stamp
from .media_files import IMAGES
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

    def __init__(self, root: Roots, prompt: str | None = None, task: Literal["describe", "draw"] = "describe") -> None:
        """
        Args:
            root: a folder, which is read with its subfolders; or several folders: only the first is read, and links in
                it may lead into the others.
            prompt: the user's words; for "draw", ``{}`` stands for the caption. ``None``: "Describe the image."; for
                "draw", the caption alone.
            task: "describe" learns the caption from the image; "draw" learns the image from the caption.
        """
        if task not in ("describe", "draw"):
            raise ValueError(f'task={task!r}: choose "describe" or "draw"')
        if prompt is None:
            prompt = "{}" if task == "draw" else "Describe the image."
        if task == "draw" and "{}" not in prompt:
            raise ValueError(f"prompt={prompt!r} must have {{}} in it, for the caption that is to be drawn")
        self.roots, self.prompt, self.task = roots_of(root), prompt, task
        self.root = self.roots[0]
        files = sorted(_files(self.root))
        images = [path for path in files if path.suffix.lower() in IMAGES]
        captions = {path for path in files if path.suffix == ".txt"}
        paired = [path for path in images if path.with_suffix(".txt") in captions]
        self.files = [str(path.relative_to(self.root)) for path in paired]
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
            try:
                caption = text.read().decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ExampleError(f"({file}) has a caption that is not valid UTF-8: {error}") from error
        if self.task == "draw":
            return Example([Message("user", [self.prompt.replace("{}", caption)])], image, name=file)
        return captioned([image], self.prompt, caption, file)


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files in a folder and its subfolders, including linked ones."""
    place = folder.resolve()
    if place in above or not folder.is_dir():  # a link to a folder above, or a broken link
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, (*above, place))
        else:
            yield path
