"""Small items that models of a family take, made of a model's config: for ranks that have no item to encode."""

from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from bigmac_lightning.contracts.batch import MediaData


def sound(config: Any) -> MediaData:
    """A short sound; a full window if the tower takes no other length."""
    audio = config.audio_config
    window = getattr(audio, "n_window", None)
    columns = 2 * window if window else 2 * getattr(audio, "max_source_positions", 8)
    features = torch.zeros(1, audio.num_mel_bins, columns)
    return {"input_features": features, "input_features_mask": torch.ones(1, columns, dtype=torch.long)}


def chunk(config: Any) -> MediaData:
    """Eight columns, which become a row."""
    audio = config.audio_config
    samples = torch.tensor([audio.samples_per_token])
    return {"input_features": torch.zeros(1, audio.feature_size, 8), "chunk_sample_lengths": samples}


def frame(config: Any) -> MediaData:
    features = torch.zeros(1, 1, config.audio_config.audio_embed_dim)
    return {"input_features": features, "input_features_mask": torch.ones(1, 1, dtype=torch.bool)}


def place(config: Any) -> MediaData:
    pixels = torch.zeros(1, 3 * config.vision_config.model_patch_size**2)
    return {"pixel_values": pixels, "image_position_ids": torch.zeros(1, 2, dtype=torch.long)}


def square_grid(config: Any) -> MediaData:
    side = round(1 / config.downsample_ratio)
    return torch.zeros(1, side, side, config.vision_config.patch_dim)


def patch(config: Any) -> MediaData:
    vision = config.vision_config
    return torch.zeros(1, vision.temporal_patch_size, vision.patch_size, vision.patch_size, vision.num_channels)


def merged(config: Any) -> MediaData:
    vision = config.vision_config
    pixels = torch.zeros(1, 2, 2, vision.num_channels * vision.patch_size**2)
    return {"pixel_values": pixels, "merge_sizes": torch.tensor(2)}


def pooled(config: Any) -> MediaData:
    vision = config.vision_config
    values = vision.num_channels * vision.patch_size**2
    made = {"pixel_values": torch.zeros(1, vision.num_position_embeddings, values)}
    for name, grid in (("image", (1, 1, 0, 0)), ("video", (1, 1, 1))):
        made[f"{name}_token_pooling"], made[f"{name}_grids"] = torch.zeros(1, 1, dtype=torch.long), torch.tensor(grid)
    return made


def filled(config: Any) -> MediaData:
    """One tile, and zeros."""
    vision = config.vision_config
    present = torch.zeros(vision.max_num_tiles, dtype=torch.long)
    present[0] = 1
    pixels = torch.zeros(vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": pixels, "aspect_ratio_ids": torch.tensor(1), "aspect_ratio_mask": present}


def indicated(config: Any) -> MediaData:
    side = config.vision_config.image_size
    return {"pixel_values": torch.zeros(1, 3, side, side), "indicators": torch.tensor([0, -1])}


def square(config: Any) -> MediaData:
    vision, side = config.vision_config, config.vision_config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {"pixel_values": torch.zeros(side**2, 3 * vision.patch_size**2), "image_position_ids": places}


def pair(config: Any) -> MediaData:
    sides = (config.vision_config.image_size, config.high_res_vision_config.image_size)
    names = ("pixel_values", "high_res_pixel_values")
    return {name: torch.zeros(3, side, side) for name, side in zip(names, sides, strict=True)}


def tile(config: Any) -> MediaData:
    vision, side = config.vision_config, config.downsample_factor
    return {
        "pixel_values": torch.zeros(1, side**2, vision.num_channels * vision.patch_size**2),
        "spatial_shapes": torch.full((1, 2), side),
        "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.int32),
    }


def crops(config: Any) -> MediaData:
    vision = config.vision_config
    size = torch.full((2,), vision.image_size)
    crops = image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size)
    pixels = torch.zeros(crops, vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": pixels, "image_sizes": size}


def phi4_image(config: Any) -> MediaData:
    """The whole picture, and one crop."""
    vision = config.vision_config
    side = vision.crop_size
    patches = side // vision.patch_size
    return {
        "pixel_values": torch.zeros(2, vision.num_channels, side, side),
        "image_sizes": torch.full((2,), side),
        "image_attention_mask": torch.ones(2, patches, patches, dtype=torch.long),
    }


def phi4_sound(config: Any) -> MediaData:
    audio = config.audio_config
    return {"input_features": torch.zeros(audio.time_reduction, audio.input_size), "beside_images": torch.tensor(False)}
