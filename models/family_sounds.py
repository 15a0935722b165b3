"""How sounds become the arguments of the library's audio towers, for each family that families.py lists.

Shape suffixes: W windows, F frames of a window, R rows of a window, D width of the LLM.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bigmac_lightning.contracts.batch import MediaData

from .family_items import Encode


def sounds(rows_of: Callable[[Any, Mapping[str, Tensor]], Tensor], lengths: str = "input_features_mask") -> Encode:
    """Encodes each sound alone, because the library returns the rows of several sounds without their borders.

    Items are dicts: "input_features" of the shape (windows, bands, columns), the spectrograms of a sound's windows, and
    what tells them from padding, which is "input_features_mask" (windows, columns) if not said otherwise.

    Args:
        lengths: the name of what tells a sound from padding.
    """

    def encode(base: Any, items: Sequence[MediaData]) -> Any:
        rows = list[Tensor]()
        for item in items:
            if isinstance(item, Tensor) or lengths not in item:
                raise ValueError(
                    f'this model needs sounds as {{"input_features": ..., "{lengths}": ...}}, as its processor makes '
                    "them"
                )
            rows.append(rows_of(base, item))
        return BaseModelOutputWithPooling(pooler_output=rows)  # type: ignore[arg-type]  # a tensor for each item

    return encode


def masked_sound(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    out = base.get_audio_features(sound["input_features"], sound["input_features_mask"], return_dict=True)
    return out.pooler_output


def sound_windows(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    return base.get_audio_features(sound["input_features"], return_dict=True).pooler_output


def chunked_sound(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    """ "chunk_sample_lengths" (windows,) says how many samples of the waveform each window has."""
    lengths = sound["chunk_sample_lengths"]
    return base.get_audio_features(sound["input_features"], lengths, return_dict=True).pooler_output


def framed_sound(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    """ "input_features" (1, frames, samples) are those of the waveform, and "input_features_mask" is (1, frames)."""
    rows_WRD = base.get_audio_features(sound["input_features"], return_dict=True).pooler_output
    return rows_WRD[sound["input_features_mask"].bool()]


def omni_sound(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    out = base.get_audio_features(sound["input_features"], sound["input_features_mask"], return_dict=True)
    return out.last_hidden_state


def qwen2_sound(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    """What the model's own forward does, as it has no method for it."""
    tower, features = base.audio_tower, sound["input_features"]
    frames_W, rows_W = tower._get_feat_extract_output_lengths(sound["input_features_mask"].sum(-1))
    frames_WF1 = features.new_zeros(len(features), (features.shape[-1] - 2) // 2 + 1, 1)
    known_WF = torch.arange(frames_WF1.shape[1], device=features.device) < frames_W[:, None]
    mask = create_bidirectional_mask(tower.config, inputs_embeds=frames_WF1, attention_mask=known_WF.long())
    rows_WRD = base.multi_modal_projector(tower(features, attention_mask=mask).last_hidden_state)
    return rows_WRD[torch.arange(rows_WRD.shape[1], device=features.device) < rows_W[:, None]]
