"""What differs between the vision- and audio-language models of transformers: a table of families, by `model_type`.

A family says how media items become the arguments of its `get_*_features`, and which inputs its LLM needs besides.
Everything else about these models is treated alike.

Shape suffixes: C channels, H and W pixels, T patches, E values of a patch, N rows of an item, D width of the LLM.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from bigmac_lightning.contracts.batch import MediaData

Encode = Callable[[Any, Sequence[Any]], Any]
"""Makes of the base model (tower, projector) and of items the output of its `get_*_features`."""


def _patches(base: Any, items: Sequence[Tensor]) -> Any:
    """Items have the shape (t, h, w, E): the processor's patches in its order, on the grid that they come from."""
    return base.get_image_features(*_on_grid(items), return_dict=True)


def _video_patches(base: Any, items: Sequence[Tensor]) -> Any:
    """As `_patches`, where the model encodes videos in another way than images."""
    return base.get_video_features(*_on_grid(items), return_dict=True)


def _on_grid(items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    grid = torch.tensor([item.shape[:3] for item in items], device=items[0].device)
    return torch.cat([item.flatten(0, 2) for item in items]), grid


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
    if not isinstance(item, dict) or name not in item:
        raise ValueError(
            f'this model needs images as {{"pixel_values": ..., "{name}": ...}}, as its processor makes them'
        )
    several = 3 if name == "pixel_values" else 2  # dimensions, with that of tiles
    return item[name] if item[name].ndim == several else item[name][None]


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


def _merged_patches(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (t, h, w, E), the processor's patches on their grid, and
    "merge_sizes", the side of the squares of patches that become a row, (). Of a video that the processor has
    compressed, "compression_mask" (rows,) tells which rows are used."""
    _needs(items, "merge_sizes")
    pixels = [pixels_of(item) for item in items]
    grid = torch.tensor([item.shape[:3] for item in pixels], device=pixels[0].device)
    sizes = torch.stack([item["merge_sizes"].reshape(()) for item in items]).to(grid.device)
    out = base.get_image_features(torch.cat([item.flatten(0, 2) for item in pixels]), grid, sizes, return_dict=True)
    masks = [item.get("compression_mask") for item in items]
    rows = zip(out.pooler_output, masks, strict=True)
    out.pooler_output = [part if mask is None else part[mask.to(part.device).bool()] for part, mask in rows]
    return out


def _strips(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (C, side, patches * side), the patches of all slices of an image, or
    of all frames of a video, one after another; and "target_sizes", the grids of the slices or frames, (slices, 2)."""
    _needs(items, "target_sizes")
    sizes = [item["target_sizes"] for item in items]
    out = base.get_image_features(torch.cat([pixels_of(item) for item in items], -1)[None], torch.cat(sizes))
    slices = iter(out.pooler_output)
    out.pooler_output = [torch.cat(list(islice(slices, len(own)))) for own in sizes]
    return out


def _with_local_crops(base: Any, items: Sequence[MediaData]) -> Any:
    """Items have the shape (C, H, W), or are dicts: such "pixel_values" of the whole image, and "pixel_values_local" of
    its crops, (crops, C, h, w), if it has any."""
    local = [None if isinstance(item, Tensor) else item.get("pixel_values_local") for item in items]
    given = [crops for crops in local if crops is not None and len(crops)]
    pixels = torch.cat([_with_crops(pixels_of(item)) for item in items])
    numbers = [0 if crops is None else len(crops) for crops in local]
    return base.get_image_features(pixels, torch.cat(given) if given else None, numbers, return_dict=True)


def _two_resolutions(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: the same image as "pixel_values" and as "high_res_pixel_values", both (C, H, W)."""
    _needs(items, "high_res_pixel_values")
    pixels = (torch.stack([item[name] for item in items]) for name in ("pixel_values", "high_res_pixel_values"))
    return base.get_image_features(*pixels, return_dict=True)


def _masked(base: Any, items: Sequence[MediaData]) -> Any:
    """Items have the shape (C, H, W) or (crops, C, H, W), or are dicts: such "pixel_values", and "pixel_mask", (H, W) or
    (crops, H, W), which tells the picture from padding."""
    pixels = torch.cat([_with_crops(pixels_of(item)) for item in items])
    masks = None
    if not isinstance(items[0], Tensor):
        _needs(items, "pixel_mask")
        masks = torch.cat([m if (m := item["pixel_mask"]).ndim == 3 else m[None] for item in items]).bool()
    layer = base.config.vision_feature_layer
    return base.get_image_features(pixels, masks, vision_feature_layer=layer, return_dict=True)


def _with_indicators(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (crops, C, H, W), and "indicators" (rows,), which says of each row
    that the image becomes which of the model's visual indicators it is; -1: a feature."""
    _needs(items, "indicators")
    pixels = [_with_crops(pixels_of(item)) for item in items]
    out = base.get_image_features(torch.cat(pixels), return_dict=True)
    crops, learned = iter(out.pooler_output), out.visual_indicator_features
    made = list[Tensor]()
    for item, own in zip(items, pixels, strict=True):
        rows = torch.cat([learned, *islice(crops, len(own))])
        features = item["indicators"] < 0
        made.append(rows[torch.where(features, features.cumsum(0) - 1 + len(learned), item["indicators"])])
    out.pooler_output = made
    return out


def _pooled_patches(name: str) -> Encode:
    """Items are dicts: "pixel_values" of the shape (crops, patches, E); "image_token_pooling" (rows, most patches of a
    row), which patches of the item a row is made of, -1 where these are fewer; and "image_grids", (4,), or for a video
    "video_grids", (3,).

    Args:
        name: "image" or "video".
    """

    def encode(base: Any, items: Sequence[MediaData]) -> Any:
        _needs(items, f"{name}_token_pooling")
        pixels, pooling, before = [pixels_of(item) for item in items], list[Tensor](), 0
        for item, own in zip(items, pixels, strict=True):
            patches = item[f"{name}_token_pooling"]
            pooling.append(torch.where(patches < 0, patches, patches + before))
            before += own.shape[0] * own.shape[1]
        get = base.get_image_features if name == "image" else base.get_video_features
        grids = torch.stack([item[f"{name}_grids"] for item in items])
        return get(torch.cat(pixels), torch.cat(pooling), grids, return_dict=True)

    return encode


def _tiles(base: Any, items: Sequence[Tensor]) -> Any:
    """As `_batched_crops`, but the model also takes which crops there are."""
    pixels = torch.stack([_with_crops(item) for item in items])
    present = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
    return base.get_image_features(pixels, present, return_dict=True)


def _projected_later(base: Any, items: Sequence[Tensor]) -> Any:
    """As `_crops`, but the model's own forward calls its projector."""
    out = base.get_image_features(torch.cat([_with_crops(item) for item in items]), return_dict=True)
    out.pooler_output = base.multi_modal_projector(out.last_hidden_state)
    return out


def _sounds(rows_of: Callable[[Any, Mapping[str, Tensor]], Tensor]) -> Encode:
    """Encodes each sound alone, because the library returns the rows of several sounds without their borders.

    Items are dicts: "input_features" of the shape (windows, bands, columns), the spectrograms of a sound's windows, and
    "input_features_mask", (windows, columns), which tells them from padding.
    """

    def encode(base: Any, items: Sequence[MediaData]) -> Any:
        rows = list[Tensor]()
        for item in items:
            if isinstance(item, Tensor) or "input_features_mask" not in item:
                raise ValueError(
                    'this model needs sounds as {"input_features": ..., "input_features_mask": ...}, as its processor '
                    "makes them"
                )
            rows.append(rows_of(base, item))
        return BaseModelOutputWithPooling(pooler_output=rows)  # type: ignore[arg-type]  # a tensor for each item

    return encode


def _masked_sound(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    out = base.get_audio_features(sound["input_features"], sound["input_features_mask"], return_dict=True)
    return out.pooler_output


def _sound_windows(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    return base.get_audio_features(sound["input_features"], return_dict=True).pooler_output


def _omni_sound(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    out = base.get_audio_features(sound["input_features"], sound["input_features_mask"], return_dict=True)
    return out.last_hidden_state


def _qwen2_sound(base: Any, sound: Mapping[str, Tensor]) -> Tensor:
    """What the model's own forward does, as it has no method for it."""
    tower, features = base.audio_tower, sound["input_features"]
    frames_W, rows_W = tower._get_feat_extract_output_lengths(sound["input_features_mask"].sum(-1))
    frames_WF1 = features.new_zeros(len(features), (features.shape[-1] - 2) // 2 + 1, 1)
    known_WF = torch.arange(frames_WF1.shape[1], device=features.device) < frames_W[:, None]
    mask = create_bidirectional_mask(tower.config, inputs_embeds=frames_WF1, attention_mask=known_WF.long())
    rows_WRD = base.multi_modal_projector(tower(features, attention_mask=mask).last_hidden_state)
    return rows_WRD[torch.arange(rows_WRD.shape[1], device=features.device) < rows_W[:, None]]


def _needs(items: Sequence[MediaData], name: str) -> None:
    if any(isinstance(item, Tensor) or name not in item for item in items):
        raise ValueError(
            f'this model needs images as {{"pixel_values": ..., "{name}": ...}}, as its processor makes them'
        )


def _with_crops(item: Tensor) -> Tensor:
    return item if item.ndim == 4 else item[None]


def pixels_of(item: MediaData) -> Tensor:
    """The pixels of an item, or the spectrograms of a sound."""
    if isinstance(item, Tensor):
        return item
    return item["pixel_values" if "pixel_values" in item else "input_features"]


def _sizes(items: Sequence[MediaData]) -> Tensor:
    """The height and width of each image, (items, 2); those of its pixels if it has no `image_sizes`."""
    sizes = [torch.tensor(i.shape[-2:]) if isinstance(i, Tensor) else i["image_sizes"] for i in items]
    return torch.stack([size.to(pixels_of(items[0]).device) for size in sizes])


def smallest_sound(config: Any) -> Mapping[str, Tensor]:
    """A short sound; a full window if the tower takes no other length."""
    audio = config.audio_config
    window = getattr(audio, "n_window", None)
    columns = 2 * window if window else 2 * getattr(audio, "max_source_positions", 8)
    features = torch.zeros(1, audio.num_mel_bins, columns)
    return {"input_features": features, "input_features_mask": torch.ones(1, columns, dtype=torch.long)}


def _smallest_strip(config: Any) -> MediaData:
    vision, side = config.vision_config, 2 ** (1 + config.merger_times)
    pixels = torch.zeros(vision.num_channels, vision.patch_size, side**2 * vision.patch_size)
    return {"pixel_values": pixels, "target_sizes": torch.full((1, 2), side)}


def _smallest_merged(config: Any) -> MediaData:
    vision = config.vision_config
    pixels = torch.zeros(1, 2, 2, vision.num_channels * vision.patch_size**2)
    return {"pixel_values": pixels, "merge_sizes": torch.tensor(2)}


def _smallest_pooled(config: Any) -> MediaData:
    vision = config.vision_config
    values = vision.num_channels * vision.patch_size**2
    made = {"pixel_values": torch.zeros(1, vision.num_position_embeddings, values)}
    for name, grid in (("image", (1, 1, 0, 0)), ("video", (1, 1, 1))):
        made[f"{name}_token_pooling"], made[f"{name}_grids"] = torch.zeros(1, 1, dtype=torch.long), torch.tensor(grid)
    return made


def _smallest_indicated(config: Any) -> MediaData:
    side = config.vision_config.image_size
    return {"pixel_values": torch.zeros(1, 3, side, side), "indicators": torch.tensor([0, -1])}


def _smallest_pair(config: Any) -> MediaData:
    sides = (config.vision_config.image_size, config.high_res_vision_config.image_size)
    names = ("pixel_values", "high_res_pixel_values")
    return {name: torch.zeros(3, side, side) for name, side in zip(names, sides, strict=True)}


def _smallest_for_sam(config: Any) -> MediaData:
    side = config.vision_config.sam_config.image_size
    return torch.zeros(3, side, side)


def _hunyuan_rows(config: Any, kind: str, grid: Sequence[int]) -> int:
    """Each line of rows ends with one more, and two stand around the image."""
    side = config.vision_config.spatial_merge_size
    return grid[1] // side * (grid[2] // side + 1) + 2


def _ernie_rows(config: Any, kind: str, grid: Sequence[int]) -> int:
    """Of a video, several time steps are joined as well."""
    vision = config.vision_config
    steps = grid[0] // vision.temporal_merge_size if kind == "video" else grid[0]
    return steps * grid[1] * grid[2] // vision.spatial_merge_size**2


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


@dataclass(frozen=True)
class Family:
    """One kind of vision- or audio-language model.

    Attributes:
        image, video, audio: encodes images, videos, sounds; ``None``: the family takes none.
        deepstack: whether the first layers of the LLM take features of their own.
        multimodal_positions: whether rotary positions have temporal, height and width parts (M-RoPE).
        takes_text_positions: whether the LLM takes text positions before these parts, by which it keeps packed samples
            apart.
        sees_images_together: whether that is so for all images of a row, and the tokens around them (Molmo 2). Then
            ``inputs["token_type_ids"]`` has to say which tokens these are.
        adds_features: whether features are added to the embeddings of their tokens, instead of replacing them.
        mixes_shapes: whether items of different shapes can be encoded together.
        bidirectional_images: whether tokens of an image see each other both ways (Gemma 3).
        joined: the number of patches, or of frames of a sound, that become a row of features, where no config says it.
        rows: the number of rows of a grid (t, h, w) of patches, where it is not t * h * w / side**2: a function of the
            config, the kind ("image" or "video") and the grid.
        vision_tokens: names of the config's token ids that layers treat as vision (Ernie 4.5 VL has experts for them).
        smallest: makes of the model's config a small item, where that is not pixels or patches alone.
    """

    image: Encode | None = None
    video: Encode | None = None
    audio: Encode | None = None
    deepstack: bool = False
    multimodal_positions: bool = False
    takes_text_positions: bool = True
    bidirectional_images: bool = False
    sees_images_together: bool = False
    adds_features: bool = False
    mixes_shapes: bool = False
    joined: int | None = None
    rows: Callable[[Any, str, Sequence[int]], int] | None = None
    vision_tokens: tuple[str, ...] = ()
    smallest: Callable[[Any], MediaData] | None = None

    @property
    def own(self) -> Encode:
        """Encodes what the family's tower is for: images, or sounds if it takes no images."""
        encode = self.image or self.audio
        assert encode is not None, "a family takes images or sounds"
        return encode


_QWEN2 = Family(_patches, _patches, mixes_shapes=True, multimodal_positions=True)
_QWEN3 = replace(_QWEN2, deepstack=True)
_PATCHES = Family(_patches, mixes_shapes=True)
_GLM = replace(_PATCHES, multimodal_positions=True)
_OMNI = Family(_patches, _patches, _sounds(_omni_sound), mixes_shapes=True, multimodal_positions=True)
_STRIPS = Family(_strips, _strips, joined=16, smallest=_smallest_strip)
_IDEFICS = Family(_batched_crops)
_SMOLVLM = Family(_batched_crops, _batched_crops)

_VISION_TOKENS = ("start_token_id", "end_token_id", "token_id")

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
    "glmga": _GLM,
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
    "llava_next_video": Family(_cut_into_crops, _pooled_video, smallest=_smallest_crops),
    "video_llava": Family(_crops, _pooled_video),
    "perception_lm": Family(_batched_crops, _batched_crops),
    "aria": Family(_masked, joined=10),
    "deepseek_ocr2": Family(_with_local_crops, joined=16, smallest=_smallest_for_sam),
    "step3p7": Family(_with_local_crops, joined=16),
    "deepseek_vl_hybrid": Family(_two_resolutions, smallest=_smallest_pair),
    "minicpmv4_6": _STRIPS,
    "minicpm_ocr": replace(_STRIPS, joined=4),
    "video_llama_3": Family(_merged_patches, _merged_patches, smallest=_smallest_merged),
    "cohere_compass": _QWEN3,
    "minimax_m3_vl": Family(_patches, _patches, mixes_shapes=True),
    "cosmos3_edge": _QWEN2,
    "cosmos3_omni": _QWEN3,
    "muse_glimmer": Family(_patches, _patches, mixes_shapes=True),
    "hyperclovax_vision_v2": Family(_patches, _patches, mixes_shapes=True),
    "llama4": Family(_projected_later, joined=4),
    "molmo2": Family(
        _pooled_patches("image"),
        _pooled_patches("video"),
        bidirectional_images=True,
        sees_images_together=True,
        adds_features=True,
        joined=4,
        smallest=_smallest_pooled,
    ),
    "ovis2": Family(_with_indicators, smallest=_smallest_indicated),
    "granite_docling": Family(_tiles, deepstack=True),
    "hunyuan_vl": replace(_GLM, rows=_hunyuan_rows, takes_text_positions=False),
    "ernie4_5_vl_moe": replace(
        _QWEN2,
        video=_video_patches,
        rows=_ernie_rows,
        vision_tokens=tuple(f"{kind}_{token}" for kind in ("image", "video") for token in _VISION_TOKENS),
    ),
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe_thinker": replace(_OMNI, deepstack=True),
    "qwen2_audio": Family(audio=_sounds(_qwen2_sound), joined=2),
    "audioflamingo3": Family(audio=_sounds(_masked_sound), joined=2),
    "voxtral": Family(audio=_sounds(_sound_windows), joined=4),
    "glmasr": Family(audio=_sounds(_masked_sound), joined=4),
    "qwen3_asr": Family(audio=_sounds(_masked_sound), joined=1),
    "gemma3": Family(_crops, bidirectional_images=True),
}

"""The families that are exact from pictures to loss; `tests/models/test_sweep.py` compares each of them."""

_CROSS = "its LLM looks at the image in cross-attention layers, so features would have to travel to all stages"
_TWO_PARTS = "its text has an encoder and a decoder, and stages here are those of a decoder"
_TOKEN_EMBEDDINGS = "its layers take embeddings of the token ids of their own, beside the hidden states"
_TALKER = (
    "it is a thinker with a talker. Save its thinker, {0}.from_pretrained(DIR).save_pretrained(OUT), and start from OUT"
)

REFUSED = {
    "paligemma": "tokens of a prompt see each other both ways, and batches here do not say where a prompt ends",
    "mllama": _CROSS,
    "blip": _CROSS,
    "idefics": _CROSS,
    "florence2": _TWO_PARTS,
    "pix2struct": _TWO_PARTS,
    "gemma3n": _TOKEN_EMBEDDINGS,
    "gemma4": _TOKEN_EMBEDDINGS,
    "qwen4_exp": _TOKEN_EMBEDDINGS,
    "gemma4_unified": "its layers hand on keys and values to later ones",
    "mistral_large4": "its rotary embedding has weights, which all stages would have to share",
    "inkling2": "its decoder has weights beside embedding, layers and final norm",
    "inkling2_loop": "its decoder has weights beside embedding, layers and final norm",
    "minicpmv4_7": "its positions depend on where an image's slices lie, which batches here do not say",
    "phi4_multimodal": "its towers lie inside its decoder, and how it projects a sound depends on the batch's images",
    "granite4_vision": "an image has features for layers that the config names, and they travel to the first layers here",
    "fast_vlm": "its tower is one of the package timm, with which nothing here has been tested",
    "blip-2": "its LLM is OPT or T5, and neither can be cut",
    "instructblip": "its tower reads the text of the question, which the encoders here do not get",
    "instructblipvideo": "its tower reads the text of the question, which the encoders here do not get",
    "git": "its images come before the text, without tokens that features could replace",
    "chameleon": "its images become tokens of its vocabulary, so there are no features to train",
    "shieldgemma2": "it classifies images, and writes no text",
    "musicflamingo": "its tower reads the token ids around a sound, which the encoders here do not get",
    "granite_speech": "its LLM has adapters that work only where there are sounds",
    "qwen2_5_omni": _TALKER.format("Qwen2_5OmniThinkerForConditionalGeneration"),
    "qwen3_omni_moe": _TALKER.format("Qwen3OmniMoeThinkerForConditionalGeneration"),
}


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family of a vision-language model; ``None`` for a model of text alone.

    Raises:
        ValueError: the model cannot be trained in a pipeline; the message says why.
    """
    kind = config.model_type
    if kind in REFUSED:
        raise ValueError(f"model_type {kind!r} cannot be cut into stages: {REFUSED[kind]}")
    if kind not in FAMILIES and "vision_config" not in config.sub_configs:
        return None
    if kind not in FAMILIES:
        raise ValueError(
            f"no vision-language model of model_type {kind!r} is known here; there are {sorted(FAMILIES)}. "
            "Its decoder alone may be one that can be trained, as HFDecoder(config.get_text_config()), with an Encoder "
            "of your own"
        )
    return FAMILIES[kind]
