"""Prepares sounds with the processor of Phi-4-multimodal, and plans them from their lengths alone.

Its spectrograms have their columns first, and there are no windows. A plan is made by the library's own processor of
silence in coarse time, as in hf_audio.py.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..example import Size
from ..media.sounds import samples_of
from .hf_audio import HFAudio
from .media_processor import Augment, MediaPlan


@dataclass(frozen=True)
class Phi4Audio(HFAudio):
    """Prepares sounds as the processor of Phi-4-multimodal does.

    `MediaItem.data` is a dictionary: "input_features" (columns, bands), the spectrogram; "beside_images", (), whether
    the example also has images; and, if the example has several sounds, which the processor fills up to the longest
    one, "input_features_mask" (columns,), which tells the sound from padding.
    """

    def plans(self, items: Sequence[Any], sizes: Sequence[Size]) -> list[MediaPlan]:
        samples = [samples_of(size, self._rate) for size in sizes]
        longest = max(samples) if len(samples) > 1 else 0
        return [self._plan(item, number, longest) for item, number in zip(items, samples, strict=True)]

    def _planned(self, item: Any, samples: int, longest: int) -> MediaPlan:
        if samples < self._extractor.win_length:
            raise self._too_short(item, samples)
        features, _, text = self._coarsely([samples, longest] if longest else [samples])
        return MediaPlan(self.encoder, text.count(self.processor.audio_token), len(features) * self._cost)

    def load(self, item: Any, size: Size, plan: MediaPlan, augment: Augment | None = None) -> dict[str, Tensor]:
        """See the class."""
        features, mask = self._loaded(item, size, plan)
        made = {"input_features": features, "beside_images": torch.tensor(plan.beside_images)}
        return made if mask is None else {**made, "input_features_mask": mask}

    @cached_property
    def _cost(self) -> float:
        """Of a column. As many of them as become a frame of the tower cost about as much as a patch of an image."""
        return 3 * self.processor.image_processor.patch_size**2 / self._extractor.audio_compression_rate

    @cached_property
    def _coarseness(self) -> int:
        return math.gcd(self._extractor.hop_length, self._extractor.win_length)

    def _coarse(self, samples: int) -> int:
        return samples // self._coarseness

    @cached_property
    def _coarse_processor(self) -> tuple[Any, dict[str, Any]]:
        shell = copy.copy(self.processor)
        extractor = shell.audio_processor = copy.copy(self._extractor)
        extractor.hop_length //= self._coarseness
        extractor.win_length //= self._coarseness
        extractor._torch_extract_fbank_features = lambda waves, *_: waves.unfold(
            -1, extractor.win_length, extractor.hop_length
        )
        return shell, self._arguments

    def _prepare(
        self, processor: Any, sounds: Sequence[np.ndarray], arguments: dict[str, Any]
    ) -> tuple[Tensor, Any, str]:
        made, texts = processor._process_audio(list(sounds), **arguments)
        mask = made.get("audio_attention_mask")
        return made["audio_input_features"][0], None if mask is None else mask[0], texts[0]
