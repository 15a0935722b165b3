"""What differs between the vision-language models of transformers: a table of families, by `model_type`.

Here is how items become the arguments of a family's `get_image_features`, and which inputs its LLM needs besides. All
else about these models is uniform. Knows nothing of stages or ranks.

Shape suffixes: C channels, H and W pixels, T patches, E values of a patch, N rows of an item, D width of the LLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Encode = Callable[[Any, Sequence[Tensor]], Any]
"""From the base model (tower, projector) and items to the output of its `get_*_features`."""


def _patches(base: Any, items: Sequence[Tensor]) -> Any:
    """Items of shape (t, h, w, E): the processor's patches, in its order, and the grid they come from."""
    grid = torch.tensor([item.shape[:3] for item in items], device=items[0].device)
    return base.get_image_features(torch.cat([item.flatten(0, 2) for item in items]), grid, return_dict=True)


def _crops(base: Any, items: Sequence[Tensor]) -> Any:
    """Items of shape (C, H, W), or (crops, C, H, W)."""
    return base.get_image_features(torch.cat([_with_crops(item) for item in items]), return_dict=True)


def _batched_crops(base: Any, items: Sequence[Tensor]) -> Any:
    return base.get_image_features(torch.stack([_with_crops(item) for item in items]), return_dict=True)


def _sized(base: Any, items: Sequence[Tensor]) -> Any:
    """Items of shape (C, H, W), of any size."""
    sizes = torch.tensor([item.shape[-2:] for item in items], device=items[0].device)
    return base.get_image_features(torch.stack(list(items)), image_sizes=sizes, return_dict=True)


def _single_crop(base: Any, items: Sequence[Tensor]) -> Any:
    pixels = torch.stack([_with_crops(item) for item in items])
    if pixels.shape[1] > 1:
        raise ValueError(
            f"an image of shape {tuple(items[0].shape)} has {pixels.shape[1]} crops: putting them together needs the "
            "picture's original size, which a media item does not carry; give one crop, as for several images"
        )
    sizes = torch.tensor([item.shape[-2:] for item in items], device=items[0].device)
    several = [max(2, len(items))]  # so that the model does not expect crops
    return base.get_image_features(pixels[:, 0], sizes, batch_num_images=several, return_dict=True)


def _pooled_video(base: Any, items: Sequence[Tensor]) -> Any:
    """Items of shape (frames, C, H, W)."""
    return base.get_video_features(torch.stack(list(items)), return_dict=True)


def _with_crops(item: Tensor) -> Tensor:
    return item if item.ndim == 4 else item[None]


@dataclass(frozen=True)
class Family:
    """One kind of vision-language model.

    Attributes:
        image: encodes images.
        video: encodes videos; ``None``: the family takes none.
        deepstack: whether the first layers of the LLM take features of their own.
        multimodal_positions: whether its rotary positions have temporal, height and width parts (M-RoPE).
        mixes_shapes: whether items of different shapes are encoded together.
        bidirectional_images: whether tokens of an image see each other both ways (Gemma 3).
    """

    image: Encode
    video: Encode | None = None
    deepstack: bool = False
    multimodal_positions: bool = False
    bidirectional_images: bool = False
    mixes_shapes: bool = False


_QWEN2 = Family(_patches, _patches, mixes_shapes=True, multimodal_positions=True)
_QWEN3 = replace(_QWEN2, deepstack=True)
_IDEFICS = Family(_batched_crops)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "llava": Family(_crops),
    "llava_onevision": Family(_single_crop, _pooled_video),
    "internvl": Family(_crops, _crops),
    "mistral3": Family(_sized),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "gemma3": Family(_crops, bidirectional_images=True),
}

REFUSED = {
    "mllama": "its LLM looks at the image in cross-attention layers, so features would have to travel to all stages",
    "gemma3n": "its layers take embeddings of the token ids of their own, beside the hidden states",
    "gemma4": "its layers take embeddings of the token ids of their own, beside the hidden states",
}


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family of a vision-language model; ``None`` for a model of text alone.

    Raises:
        ValueError: it cannot be trained in a pipeline, with the reason.
    """
    kind = config.model_type
    for prefix, reason in REFUSED.items():
        if kind.startswith(prefix):
            raise ValueError(f"model_type {kind!r} cannot be cut into stages: {reason}")
    if "vision_config" not in config.sub_configs:
        return None
    if kind not in FAMILIES:
        raise ValueError(
            f"no vision-language model of model_type {kind!r} is known here; there are {sorted(FAMILIES)}. "
            "Its decoder alone can be trained as an HFDecoder (config.get_text_config()) with an Encoder of your own"
        )
    return FAMILIES[kind]
