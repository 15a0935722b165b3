"""Voxtral: a tokenizer that makes the tokens that mistral-common makes, and sounds by its processor.

mistral-common makes the tokens of a conversation at once, and does not tell which characters each of them stands for.
So transformers' conversion of the vocabulary makes them here, by the chat template that mistral-common writes for it.
The two are compared before anything is measured.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ExampleError
from ..example import Size
from ..media.sounds import read_sound, samples_of
from .media_processor import Augment, MediaPlan, MediaProcessor

PRELUDE = (
    "{%- set trimmed = namespace(messages=[]) %}{%- for m in messages %}"
    "{%- set m = dict(m, content=m.content.rstrip(' ')) if m.role == 'assistant' and m.content is string else m %}"
    "{%- set trimmed.messages = trimmed.messages + [m] %}{%- endfor %}{%- set messages = trimmed.messages %}"
)
"""Cuts off the spaces at the end of replies, as mistral-common does, but not the template that it writes."""

TEXTS = (
    "What's 1,234.5 plus 6?\n\n  It is",
    "Größe: 日本語\r\n\tx  y ",
    "def f(x):\n    return {x: 'I'LL'}\n",
    " 🤗 a  ",
)
"""Texts of which both must make the same tokens."""


def fast_tokenizer(processor: Any) -> Any:
    """The fast tokenizer of the processor's vocabulary, with a chat template.

    Raises:
        ValueError: mistral-common is not installed, or it makes other tokens.
    """
    given = processor.tokenizer
    if type(given).__name__ != "MistralCommonBackend":
        raise ValueError(
            "processor is a VoxtralProcessor, whose tokens and sounds mistral-common prepares: install it with "
            "pip install 'bigmac-lightning[voxtral]'"
        )
    sounds = given.tokenizer.instruct_tokenizer.audio_encoder
    if sounds is None or sounds.audio_config.chunk_length_s is None:
        raise ValueError(
            "processor is a VoxtralProcessor, and its tekken.json does not say how sounds are cut into windows: give "
            "the one of Voxtral"
        )
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    path = str(given._tokenizer_path)
    made: Any = convert_tekken_tokenizer(path)
    made.chat_template = PRELUDE + (made.chat_template or "")
    by_library = type(given)(path, mode="finetuning")
    for asked, reply in zip(TEXTS, reversed(TEXTS), strict=True):
        turns = [{"role": role, "content": text} for role, text in (("user", asked), ("assistant", reply))] * 2
        found = made(made.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        if found != by_library.apply_chat_template(turns, return_dict=False):
            raise ValueError(
                f"processor is a VoxtralProcessor, and mistral-common makes other tokens of {asked!r} and {reply!r} "
                "than the tokenizer that transformers makes of its vocabulary, so it cannot be used here"
            )
    return made


@dataclass(frozen=True)
class VoxtralAudio(MediaProcessor):
    """Prepares sounds as the processor of Voxtral does, in windows of which the last one is filled with silence.

    `MediaItem.data` is a dictionary: "input_features" (windows, bands, columns), and "input_features_mask" (windows,
    columns), which is 1: the tower sees the silence, too.

    Attributes:
        processor: a `VoxtralProcessor` with the tokenizer of mistral-common.
        encoder: the model's name of the encoder.
    """

    processor: Any
    encoder: str = "audio"
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def fingerprint(self) -> str:
        made = (self.encoder, self.processor.feature_extractor.to_json_string(), self._sounds.audio_config)
        return repr((type(self).__name__, made))

    @property
    def _sounds(self) -> Any:
        """What makes tokens of sounds in mistral-common."""
        return self.processor.tokenizer.tokenizer.instruct_tokenizer.audio_encoder

    @property
    def _rate(self) -> int:
        return self._sounds.audio_config.sampling_rate

    def plan(self, item: Any, size: Size, alone: bool = True) -> MediaPlan:
        windows = -(-samples_of(size, self._rate) // self._sounds.audio_config.chunk_frames)
        if windows not in self._texts:
            silence = np.zeros(windows * self._sounds.audio_config.chunk_frames, np.float32)
            self._texts[windows] = self._encoded(silence)[0]
        text = self._texts[windows]
        columns = windows * self._sounds.audio_config.chunk_frames // self.processor.feature_extractor.hop_length
        return MediaPlan(self.encoder, text.count(self.processor.audio_token), float(columns), text=text)

    def load(self, item: Any, size: Size, plan: MediaPlan, augment: Augment | None = None) -> dict[str, Tensor]:
        """See the class."""
        text, sound = self._encoded(read_sound(item.file, size, self._rate).numpy())
        if text != plan.text:
            raise ExampleError(f"{item.file.name} became other tokens than its plan has")
        arguments = dict(self.processor._merge_kwargs()["audio_kwargs"])
        columns = arguments.pop("max_source_positions")
        features = torch.as_tensor(self.processor._retrieve_input_features([sound], columns, **arguments)).contiguous()
        return {"input_features": features, "input_features_mask": torch.ones(len(features), columns, dtype=torch.long)}

    def _encoded(self, wave: np.ndarray) -> tuple[str, np.ndarray]:
        """The text that stands for a sound, and the sound with silence at its end."""
        from mistral_common.tokens.tokenizers.audio import Audio  # pyright: ignore[reportMissingImports]

        made = self._sounds.encode_audio(Audio(wave, self._rate, "wav"))
        return "".join(self.processor.tokenizer.convert_ids_to_tokens(made.tokens)), made.audio.audio_array
