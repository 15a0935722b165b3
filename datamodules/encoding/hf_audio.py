"""Prepares sounds with a processor of the transformers library, and plans them from their lengths alone.

A plan is made by the library's own processor: it gets silence, its feature extractor computes no spectrogram, and time
is so coarse that a column of the spectrogram has two samples. What the processor makes of a length (windows, masks,
tokens) depends only on the number of columns, and on whether the last one is whole, and both stay the same. So this
file has no rules for windows, padding or the text around them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ExampleError
from ..example import Size
from ..media.sounds import read_sound, samples_of
from .media_processor import Augment, MediaPlan, MediaProcessor

MASKS = ("input_features_mask", "feature_attention_mask")
"""Names of what tells the columns of a sound from padding."""
IN_SAMPLES = ("n_samples", "min_length", "max_length", "pad_to_multiple_of")
"""Lengths that a feature extractor has, or is given."""
MAX_PLANS = 65536
"""Most plans that are cached: a few hundred bytes each. A cache that is full is cleared."""


@dataclass(frozen=True)
class HFAudio(MediaProcessor):
    """Prepares sounds as the processor of a pretrained audio-language model does.

    `MediaItem.data` is a dictionary: "input_features" (windows, bands, columns), and "input_features_mask" (windows,
    columns), which tells a sound from padding.

    A sound that the processor would cut off is refused, and so is every sound if the processor cannot say which text
    stands for it.

    Attributes:
        processor: a processor, as `AutoProcessor.from_pretrained` returns it.
        encoder: the model's name of the encoder.
    """

    processor: Any
    encoder: str = "audio"
    _plans: dict[tuple[int, int], MediaPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if getattr(self.processor, "load_audio_from_video", False):
            raise ValueError(
                f"{self._name} has load_audio_from_video, which puts the sound of a video between its frames: set it "
                "to false in processor_config.json, and give the sound as an item of its own"
            )

    def fingerprint(self) -> str:
        import transformers

        settings = (self.encoder, transformers.__version__, self._arguments)
        return repr((type(self).__name__, settings, self.processor.to_json_string()))

    @property
    def _name(self) -> str:
        return type(self.processor).__name__

    @property
    def _extractor(self) -> Any:
        return self.processor._audio_processor

    @property
    def _rate(self) -> int:
        return self._extractor.sampling_rate

    def plan(self, item: Any, size: Size, alone: bool = True) -> MediaPlan:
        return self.plans([item], [size])[0]

    def plans(self, items: Sequence[Any], sizes: Sequence[Size]) -> list[MediaPlan]:
        """Some processors fill up the sounds of an example to the longest one, and then make other columns of their
        ends."""
        self._check()
        samples = [samples_of(size, self._rate) for size in sizes]
        longest = max(samples) if self._fills_up else 0
        return [self._plan(item, n, longest if longest > n else 0) for item, n in zip(items, samples, strict=True)]

    def _plan(self, item: Any, samples: int, longest: int) -> MediaPlan:
        key = (self._coarse(samples), self._coarse(longest))
        if key not in self._plans:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = self._planned(item, samples, longest)
        return replace(self._plans[key], longest=longest) if longest else self._plans[key]

    def _planned(self, item: Any, samples: int, longest: int) -> MediaPlan:
        extractor = self._extractor
        seconds, least = samples / self._rate, extractor.n_fft // 2 + 1
        features, mask, text = self._coarsely([samples, longest] if longest else [samples])
        kept = int(mask.sum())
        if kept < samples // extractor.hop_length:
            most = kept * extractor.hop_length / self._rate
            raise ExampleError(
                f"has {item.file.name}, a sound of {seconds:.2f} s, of which {self._name} would use the first "
                f"{most:g} s: cut it into shorter ones"
            )
        rows = text.count(self.processor.audio_token)
        if not rows or samples < least:
            raise self._too_short(item, samples)
        whole = text == self.processor.audio_token * rows
        columns = kept if self._drops_padding else features.shape[0] * features.shape[-1]
        return MediaPlan(self.encoder, rows, columns * self._cost, text=None if whole else text)

    def load(self, item: Any, size: Size, plan: MediaPlan, augment: Augment | None = None) -> dict[str, Tensor]:
        """See the class."""
        features, mask = self._loaded(item, size, plan)
        if self._drops_padding:
            columns = int(mask.sum())
            features, mask = features[..., :columns], mask[..., :columns]
        return {"input_features": features.contiguous(), "input_features_mask": mask.contiguous()}

    def _loaded(self, item: Any, size: Size, plan: MediaPlan) -> tuple[Tensor, Any]:
        """What the processor makes of a sound: its spectrograms and their mask.

        Raises:
            ExampleError: that is not what has been planned.
        """
        sounds = [read_sound(item.file, size, self._rate).numpy()]
        if plan.longest:
            sounds.append(np.zeros(plan.longest, np.float32))
        features, mask, text = self._prepare(self.processor, sounds, self._arguments)
        if text != (self.processor.audio_token * plan.rows if plan.text is None else plan.text):
            raise ExampleError(
                f"{item.file.name} became {text.count(self.processor.audio_token)} rows of features, but its plan has "
                f"{plan.rows}: {self._name} cannot be used here, so prepare the sounds with a processor of your own "
                "(see docs/data.md)"
            )
        return features, mask

    def _too_short(self, item: Any, samples: int) -> ExampleError:
        seconds = samples / self._rate
        return ExampleError(f"has {item.file.name}, a sound of {seconds:.3f} s, which is too short for {self._name}")

    def _check(self) -> None:
        """
        Raises:
            ValueError: the processor is none of those that can be planned.
        """
        from transformers import ProcessorMixin

        extractor = self._extractor
        reason = ""
        if not hasattr(extractor, "_torch_extract_fbank_features") or not hasattr(extractor, "n_samples"):
            reason = f"{type(extractor).__name__} does not work like Whisper's feature extractor"
        elif type(self.processor).replace_audio_token is ProcessorMixin.replace_audio_token:
            reason = "it does not say which text stands for a sound"
        if reason:
            raise _refused(self.processor, reason)

    @cached_property
    def _fills_up(self) -> bool:
        """Whether the processor fills up the sounds that it gets together to the longest one."""
        alone, _, _ = self._coarsely([self._rate])
        beside, _, _ = self._coarsely([self._rate, 2 * self._rate])
        return alone.shape[-1] != beside.shape[-1]

    @cached_property
    def _cost(self) -> float:
        """Of a column. Two of them become a frame of the tower, which costs about as much as a patch of an image."""
        images = getattr(self.processor, "image_processor", None)
        side, frames = (getattr(images, name, None) for name in ("patch_size", "temporal_patch_size"))
        return 3 * frames * side**2 / 2 if isinstance(side, int) and frames else 1.0

    @cached_property
    def _drops_padding(self) -> bool:
        """Whether the encoder sees the columns of the sound alone, as those of the Omni models do. Then padding, which
        may be of minutes, is cut off here."""
        from transformers.processing_utils import OmniModalProcessorMixin

        return isinstance(self.processor, OmniModalProcessorMixin)

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        """The arguments that the processor gives to `_process_audio` when it is called."""
        given = self.processor._merge_kwargs(
            tokenizer_init_kwargs=self.processor.tokenizer.init_kwargs, common_kwargs={"return_tensors": "pt"}
        )
        return {**given["audio_kwargs"], "sampling_rate": self._rate}

    def _coarsely(self, samples: Sequence[int]) -> tuple[Tensor, Any, str]:
        """As `_prepare` for silence of these lengths, but without values."""
        processor, arguments = self._coarse_processor
        silence = [np.zeros(self._coarse(number), np.float32) for number in samples]
        return self._prepare(processor, silence, arguments)

    def _coarse(self, samples: int) -> int:
        if self._coarseness == 1:
            return samples
        columns, rest = divmod(samples, self._extractor.hop_length)
        return 2 * columns + (rest > 0)

    @cached_property
    def _coarseness(self) -> int:
        """The number of samples that become one; 1, where lengths are no whole columns."""
        extractor = self._extractor
        lengths = [getattr(extractor, name, None) for name in IN_SAMPLES]
        lengths += [self._arguments.get(name) for name in IN_SAMPLES]
        whole = all(length % extractor.hop_length == 0 for length in lengths if length)
        half, odd = divmod(extractor.hop_length, 2)
        return 1 if odd or not whole or self._rate % half else half

    @cached_property
    def _coarse_processor(self) -> tuple[Any, dict[str, Any]]:
        """The processor without spectrograms, in coarse time, and its arguments."""
        by, shell = self._coarseness, copy.copy(self.processor)
        extractor = shell.feature_extractor = copy.copy(self._extractor)
        extractor.hop_length //= by
        arguments = dict(self._arguments)
        for name in (*IN_SAMPLES, "sampling_rate"):
            if value := getattr(extractor, name, None):
                setattr(extractor, name, value // by)
            if value := arguments.get(name):
                arguments[name] = value // by
        extractor._torch_extract_fbank_features = partial(_no_values, extractor.hop_length)
        return shell, arguments

    def _prepare(
        self, processor: Any, sounds: Sequence[np.ndarray], arguments: dict[str, Any]
    ) -> tuple[Tensor, Any, str]:
        """The spectrograms of the windows of the first sound, their mask, and the text that stands for the sound."""
        made, texts = processor._process_audio(list(sounds), **arguments)
        mask = next((made[name] for name in MASKS if name in made), None)
        if mask is None:
            raise _refused(processor, "it makes no mask that tells a sound from padding")
        features = made["input_features"]
        if len(sounds) > 1:  # which the processor fills up, and so does not cut into windows
            features, mask = features[:1], mask[:1]
        return torch.as_tensor(features), torch.as_tensor(mask), texts[0]


def _refused(processor: Any, reason: str) -> ValueError:
    return ValueError(
        f"sounds cannot be planned with {type(processor).__name__}: {reason}. Prepare them with a processor of your "
        'own, media={"audio": ...} (see docs/data.md)'
    )


def _no_values(hop: int, waves: np.ndarray, device: str = "cpu") -> np.ndarray:
    """As many columns as a spectrogram of these samples has."""
    return np.zeros((len(waves), 1, waves.shape[-1] // hop), np.float32)
