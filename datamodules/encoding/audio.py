"""Prepares sounds for encoders: spectrograms of windows of equal length, by a feature extractor of transformers."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.contracts.remote_code import without_asking

from ..errors import ExampleError
from ..example import Size
from ..media.sounds import read_sound, samples_of
from .media_processor import Augment, MediaPlan, MediaProcessor

STRIDE = 2
"""Columns of the spectrogram in a frame of the tower."""


@dataclass(frozen=True)
class AudioProcessor(MediaProcessor):
    """Prepares sounds for Whisper's encoder, see `AudioEncoder`.

    A sound is cut into windows of the extractor's length. The last one is filled with silence, of which no rows are
    made, so a sound has as many rows as it is long.

    Attributes:
        extractor: the arguments of a `WhisperFeatureExtractor`, such as ``{"feature_size": 80, "chunk_length": 30}``;
            or the folder or name of a pretrained one; or a ready one.
        merge: number of the tower's frames in a row, as the encoder joins them.
        encoder: the model's name of the encoder.
        max_seconds: longest sound.
    """

    extractor: Any = None
    merge: int = 1
    encoder: str = "audio"
    max_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.merge < 1 or self.max_seconds <= 0:
            raise ValueError(f"merge={self.merge} and max_seconds={self.max_seconds} must be positive")
        made = self.features
        if not hasattr(made, "n_samples"):
            raise ValueError(
                f"extractor={self.extractor!r} is a {type(made).__name__}, which has no windows of one length: give "
                "Whisper's, or another that has n_samples"
            )
        if made.n_samples % (made.hop_length * STRIDE * self.merge):
            raise ValueError(
                f"a window of {made.n_samples} samples does not consist of whole rows of {STRIDE * self.merge} times "
                f"hop_length={made.hop_length} samples: change chunk_length or merge={self.merge}"
            )

    @cached_property
    def features(self) -> Any:
        """The feature extractor."""
        from transformers import AutoFeatureExtractor, WhisperFeatureExtractor, dynamic_module_utils

        given = self.extractor
        if given is None or isinstance(given, dict):
            return WhisperFeatureExtractor(**(given or {}))
        if isinstance(given, str):
            with without_asking(f"the feature extractor {given}", "give a ready one", dynamic_module_utils):
                return AutoFeatureExtractor.from_pretrained(local_folder(given))
        return given

    @property
    def _frames(self) -> int:
        """The tower's frames of a window."""
        return self.features.n_samples // self.features.hop_length // STRIDE

    def fingerprint(self) -> str:
        settings = json.dumps(self.features.to_dict(), sort_keys=True, default=str)
        return repr((type(self).__name__, settings, self.merge, self.encoder, self.max_seconds))

    def plan(self, item: Any, size: Size, alone: bool = True) -> MediaPlan:
        if size.seconds > self.max_seconds:
            raise ExampleError(
                f"has {item.file.name}, a sound of {size.seconds:.1f} s; the most is max_seconds={self.max_seconds:g}"
            )
        windows, kept = self._kept(size)
        return MediaPlan(self.encoder, kept // self.merge, float(windows * self._frames), seconds=None)

    def _kept(self, size: Size) -> tuple[int, int]:
        """The number of windows of a sound, and of the tower's frames that are used."""
        whole, rest = divmod(samples_of(size, self.features.sampling_rate), self.features.n_samples)
        of_row = self.features.hop_length * STRIDE * self.merge
        rows = -(-rest // of_row)
        return whole + (rest > 0), whole * self._frames + rows * self.merge

    def load(self, item: Any, size: Size, plan: MediaPlan, augment: Augment | None = None) -> dict[str, Tensor]:
        """The spectrograms (windows, bands, columns), float32, and the numbers of the frames that are used."""
        made = self.features
        sound = read_sound(item.file, size, made.sampling_rate)
        pieces = [piece.numpy() for piece in sound.split(made.n_samples)]
        windows = made(pieces, sampling_rate=made.sampling_rate, return_tensors="pt")["input_features"]
        number, kept = self._kept(size)
        assert len(windows) == number
        return {"windows": windows, "frames": torch.arange(kept)}
