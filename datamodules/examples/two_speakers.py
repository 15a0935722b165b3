"""A conversation of two people, cut into half seconds, each with who speaks in it: the 30 seconds of real speech of the
`pyannote.audio` package, whose code is not used (``pip install --no-deps pyannote.audio``)."""

import io
import wave
from functools import partial
from pathlib import Path
from typing import Literal

from ..example import Audio, Example, Message
from ..files import File
from ..sources.source import Source
from .installed import installed_folder

HELD_OUT = ((4.4, 6.6), (12.9, 14.6), (16.6, 18.0), (25.6, 27.8), (28.4, 30.0))
"""From when to when, in seconds, the sound is for validation: of nobody, and of each of the two."""

NOBODY, NAMES = "nobody", {"speaker90": "the first", "speaker91": "the second"}

MOST = 0.9
"""The part of a piece in which a person must speak, so that it is his or hers."""


class TwoSpeakers(Source):
    """``<audio> Who speaks?`` and "nobody", "the first" or "the second"."""

    def __init__(self, split: Literal["train", "val"] = "train", seconds: float = 0.5, step: float = 0.05) -> None:
        """
        Args:
            split: pieces for training, which do not overlap those for validation; or the latter.
            seconds: length of a piece.
            step: from the start of a piece to that of the next one, in seconds.
        """
        folder = installed_folder("pyannote.audio", "--no-deps pyannote.audio") / "sample"
        self.path, self.seconds = folder / "sample.wav", seconds
        turns = _turns(folder / "sample.rttm")
        with wave.open(str(self.path)) as sound:
            whole = sound.getnframes() / sound.getframerate()
        starts = [round(k * step, 6) for k in range(int((whole - seconds) / step) + 1)]
        held_out = [any(a <= start and start + seconds <= b for a, b in HELD_OUT) for start in starts]
        beside = [all(start + seconds <= a or b <= start for a, b in HELD_OUT) for start in starts]
        chosen = held_out if split == "val" else beside
        found = [(start, _speaker(turns, start, start + seconds)) for start, c in zip(starts, chosen, strict=True) if c]
        self.pieces = [(start, who) for start, who in found if who is not None]

    def __len__(self) -> int:
        return len(self.pieces)

    def fingerprint(self) -> str:
        return "4.0"

    def identity(self) -> str:
        return repr((type(self).__qualname__, self.seconds, self.pieces))

    def __getitem__(self, index: int) -> Example:
        start, who = self.pieces[index]
        name = f"{self.path.name} from {start:g} s"
        sound = Audio(File.lazy(name, partial(_piece, self.path, start, self.seconds)))
        return Example([Message("user", [sound, "Who speaks?"]), Message("assistant", [who])], name=name)


def _turns(path: Path) -> list[tuple[float, float, str]]:
    """Start, end and speaker of each turn, from a file in the format RTTM."""
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(float(row[3]), float(row[3]) + float(row[4]), NAMES[row[7]]) for row in rows]


def _speaker(turns: list[tuple[float, float, str]], start: float, end: float) -> str | None:
    """Who speaks in a piece; ``None``: both, or somebody in a part of it."""
    spoken: dict[str, float] = {}
    for begin, stop, name in turns:
        if (overlap := min(stop, end) - max(begin, start)) > 0:
            spoken[name] = spoken.get(name, 0.0) + overlap
    if not spoken:
        return NOBODY
    [name, *others] = spoken
    return name if not others and spoken[name] >= MOST * (end - start) else None


def _piece(path: Path, start: float, seconds: float) -> bytes:
    """A piece of a wav file as a wav file."""
    made = io.BytesIO()
    with wave.open(str(path)) as sound, wave.open(made, "wb") as piece:
        piece.setparams(sound.getparams())
        sound.setpos(round(start * sound.getframerate()))
        piece.writeframes(sound.readframes(round(seconds * sound.getframerate())))
    return made.getvalue()
