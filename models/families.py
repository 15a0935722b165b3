"""What differs between the vision-language models of transformers: a table of families, by `model_type`.

A family says how media items become the arguments of its `get_image_features`, and which inputs its LLM needs besides.
Everything else about these models is treated alike.

Shape suffixes: C channels, H and W pixels, T patches, E values of a patch, N rows of an item, D width of the LLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from bigmac_lightning.contracts.batch import MediaData

from .llm.multimodal_inputs import gemma3_masks, gemma4_masks

Encode = Callable[[Any, Sequence[Any]], Any]
"""Makes of the base model (tower, projector) and of items the output of its `get_*_features`."""


def _patches(base: Any, items: Sequence[Tensor]) -> Any:
    """Items have the shape (t, h, w, E): the processor's patches in its order, on the grid that they come from."""
    grid = torch.tensor([item.shape[:3] for item in items], device=items[0].device)
    return base.get_image_features(torch.cat([item.flatten(0, 2) for item in items]), grid, return_dict=True)


def _square_patches(base: Any, items: Sequence[Tensor]) -> Any:
    """As `_patches`, but the model takes patches of the shape (C, side, side)."""
    grid = torch.tensor([item.shape[:3] for item in items], device=items[0].device)
    side = base.config.vision_config.patch_size
    patches = torch.cat([item.flatten(0, 2) for item in items]).unflatten(-1, (-1, side, side))
    return base.get_image_features(patches, grid, return_dict=True)


def _padded_patches(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (T, E) or (tiles, T, E), where T is the most patches that a tile can
    have; "spatial_shapes", the grids of the tiles, (2,) or (tiles, 2); and "pixel_attention_mask", (T,) or (tiles, T),
    which tells patches from padding."""
    names = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    given = {name: torch.cat([_tiled(item, name) for item in items]) for name in names}
    return base.get_image_features(**given, return_dict=True)


def _tiled(item: MediaData, name: str) -> Tensor:
    value, several = _value(item, name), 3 if name == "pixel_values" else 2  # dimensions, with that of tiles
    return value if value.ndim == several else value[None]


def _value(item: MediaData, name: str) -> Tensor:
    if not isinstance(item, dict) or name not in item:
        raise ValueError(
            f'this model needs images as {{"pixel_values": ..., "{name}": ...}}, as its processor makes them'
        )
    return item[name]


def _crops(base: Any, items: Sequence[Tensor]) -> Any:
    """Items have the shape (C, H, W), or (crops, C, H, W)."""
    return base.get_image_features(torch.cat([_with_crops(item) for item in items]), return_dict=True)


def _batched_crops(base: Any, items: Sequence[Tensor]) -> Any:
    """As `_crops`, but the model takes a dimension of items before that of crops."""
    return base.get_image_features(torch.stack([_with_crops(item) for item in items]), return_dict=True)


def _sized(base: Any, items: Sequence[MediaData]) -> Any:
    """Items have the shape (C, H, W) or (1, C, H, W), with any H and W."""
    pixels = torch.cat([_with_crops(pixels_of(item)) for item in items])
    return base.get_image_features(pixels, image_sizes=_sizes(items), return_dict=True)


def _padded_images(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (T, E), where T is the same for all images, and
    "image_position_ids", the places of the patches in the picture, (T, 2); -1 for padding."""
    pixels, places = (torch.stack([_value(item, name) for item in items]) for name in _PLACED)
    return base.get_image_features(pixels, places, return_dict=True)


def _padded_frames(base: Any, items: Sequence[MediaData]) -> Any:
    """As `_padded_images`, with a dimension of frames before all others."""
    pixels, places = (torch.cat([_value(item, name) for item in items]) for name in _PLACED)
    frames = torch.tensor([len(pixels_of(item)) for item in items])
    return base.get_video_features(pixels, places, num_frames_per_video=frames, return_dict=True)


_PLACED = ("pixel_values", "image_position_ids")


def _any_resolution(base: Any, items: Sequence[MediaData]) -> Any:
    """Items have the shape (C, H, W) or (crops, C, H, W). Those with several crops come with the image's size."""
    pixels = torch.stack([_with_crops(pixels_of(item)) for item in items])
    whole = pixels.shape[1] == 1
    if not whole and not all(isinstance(item, dict) for item in items):
        raise ValueError(
            f"an image has {pixels.shape[1]} crops: putting them together needs the picture's original size. Give its "
            'data as {"pixel_values": crops, "image_sizes": (height, width)}, or one crop, as for several images'
        )
    # The model expects several crops only of an image that is the only one of its sample. So images of one crop are
    # given as those of one sample with at least two images, and the others as one sample each.
    samples = [max(2, len(items))] if whole else [1] * len(items)
    return base.get_image_features(pixels, _sizes(items), batch_num_images=samples, return_dict=True)


def _cut_into_crops(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (crops, C, H, W), and "image_sizes", the picture's own size, by
    which the model puts the crops together."""
    if not all(isinstance(item, dict) for item in items):
        raise ValueError(
            'this model needs images as {"pixel_values": crops, "image_sizes": (height, width)}, as its processor '
            "makes them"
        )
    pixels = torch.stack([pixels_of(item) for item in items])
    return base.get_image_features(pixels, _sizes(items), return_dict=True)


def _pooled_video(base: Any, items: Sequence[Tensor]) -> Any:
    """Items have the shape (frames, C, H, W)."""
    return base.get_video_features(torch.stack(list(items)), return_dict=True)


def _with_crops(item: Tensor) -> Tensor:
    return item if item.ndim == 4 else item[None]


def pixels_of(item: MediaData) -> Tensor:
    return item if isinstance(item, Tensor) else item["pixel_values"]


def _sizes(items: Sequence[MediaData]) -> Tensor:
    """The height and width of each image, (items, 2); those of its pixels if it has no `image_sizes`."""
    sizes = [torch.tensor(i.shape[-2:]) if isinstance(i, Tensor) else i["image_sizes"] for i in items]
    return torch.stack([size.to(pixels_of(items[0]).device) for size in sizes])


def _smallest_tile(config: Any) -> MediaData:
    vision, side = config.vision_config, config.downsample_factor
    return {
        "pixel_values": torch.zeros(1, side**2, vision.num_channels * vision.patch_size**2),
        "spatial_shapes": torch.full((1, 2), side),
        "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.int32),
    }


def _smallest_crops(config: Any) -> MediaData:
    vision = config.vision_config
    size = torch.full((2,), vision.image_size)
    crops = image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size)
    pixels = torch.zeros(crops, vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": pixels, "image_sizes": size}


def _smallest_square(config: Any) -> MediaData:
    vision, side = config.vision_config, config.vision_config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {"pixel_values": torch.zeros(side**2, 3 * vision.patch_size**2), "image_position_ids": places}


def _always(config: Any) -> bool:
    return True


def _gemma4_sees_both_ways(config: Any) -> bool:
    return config.get_text_config().use_bidirectional_attention == "vision"


@dataclass(frozen=True)
class Family:
    """One kind of vision-language model.

    Attributes:
        image: encodes images.
        video: encodes videos; ``None``: the family takes no videos.
        deepstack: whether the first layers of the LLM take features of their own.
        multimodal_positions: whether rotary positions have temporal, height and width parts (M-RoPE).
        mixes_shapes: whether items of different shapes can be encoded together.
        image_masks: makes masks by which tokens of an image see each other both ways; ``None``: they do not.
        sees_both_ways: says of the model's config whether such masks are used.
        joined: the number of patches that become a row of features, where no config says it.
        smallest: makes of the model's config a small item, where that is not pixels or patches alone.
    """

    image: Encode
    video: Encode | None = None
    deepstack: bool = False
    multimodal_positions: bool = False
    image_masks: Callable[[Any, Tensor, dict[str, Tensor]], Any] | None = None
    sees_both_ways: Callable[[Any], bool] = _always
    mixes_shapes: bool = False
    joined: int | None = None
    smallest: Callable[[Any], MediaData] | None = None


_QWEN2 = Family(_patches, _patches, mixes_shapes=True, multimodal_positions=True)
_QWEN3 = replace(_QWEN2, deepstack=True)
_PATCHES = Family(_patches, mixes_shapes=True)
_GLM = replace(_PATCHES, multimodal_positions=True)
_IDEFICS = Family(_batched_crops)
_SMOLVLM = Family(_batched_crops, _batched_crops)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN2,
    "qwen3_5_moe": _QWEN2,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "glm_ocr": _GLM,
    "paddleocr_vl": replace(_GLM, image=_square_patches),
    "exaone4_5": replace(_PATCHES, video=_patches),
    "kimi_k25": replace(_PATCHES, image=_square_patches),
    "lfm3_vl": _PATCHES,
    "lfm2_vl": Family(_padded_patches, smallest=_smallest_tile),
    "aya_vision": Family(_crops),
    "cohere2_vision": Family(_crops),
    "llava": Family(_crops),
    "vipllava": Family(_crops),
    "deepseek_vl": Family(_crops),
    "janus": Family(_crops),
    "got_ocr2": Family(_crops, joined=16),
    "qianfan_ocr": Family(_crops),
    "llava_next": Family(_cut_into_crops, smallest=_smallest_crops),
    "llava_onevision": Family(_any_resolution, _pooled_video),
    "internvl": Family(_crops, _crops),
    "mistral3": Family(_sized),
    "lighton_ocr": Family(_sized),
    "idefics2": _IDEFICS,
    "idefics3": _IDEFICS,
    "smolvlm": _SMOLVLM,
    "gemma3": Family(_crops, image_masks=gemma3_masks),
    "gemma4": Family(
        _padded_images,
        _padded_frames,
        image_masks=gemma4_masks,
        sees_both_ways=_gemma4_sees_both_ways,
        smallest=_smallest_square,
    ),
}

"""The families that are exact from pictures to loss; `tests/models/test_sweep.py` compares each of them."""

REFUSED = {
    "paligemma": "tokens of a prompt see each other both ways, and batches here do not say where a prompt ends",
    "mllama": "its LLM looks at the image in cross-attention layers, so features would have to travel to all stages",
    "gemma3n": "embeddings of the tokens around its images and sounds belong to its towers; its decoder alone can be "
    "trained, as HFDecoder(config.get_text_config())",
}


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family of a vision-language model; ``None`` for a model of text alone.

    Raises:
        ValueError: the model cannot be trained in a pipeline; the message says why.
    """
    kind = config.model_type
    if kind in REFUSED:
        raise ValueError(f"model_type {kind!r} cannot be cut into stages: {REFUSED[kind]}")
    if "vision_config" not in config.sub_configs:
        return None
    if kind not in FAMILIES:
        raise ValueError(
            f"no vision-language model of model_type {kind!r} is known here; there are {sorted(FAMILIES)}. "
            "Its decoder alone may be one that can be trained, as HFDecoder(config.get_text_config()), with an Encoder "
            "of your own"
        )
    return FAMILIES[kind]
