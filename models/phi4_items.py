"""How pictures and sounds become the arguments of the towers of Phi-4-multimodal, which lie inside its decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bigmac_lightning.contracts.batch import MediaData

from .family_items import dicts


def phi4_images(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (crops, C, H, W), the whole picture first; "image_sizes", (2,), the
    size of all its other crops together; and "image_attention_mask", (crops, T, T), which is 1 for patches of the
    picture."""
    given, config = dicts(items, "image_attention_mask"), base.config.vision_config
    names = ("pixel_values", "image_sizes", "image_attention_mask")
    pixels, sizes, masks = (torch.stack([item[name] for item in given]) for name in names)
    rows, masks = list[int](), masks.bool()  # a sum of 16-bit numbers would be rounded
    for (down, across), mask in zip((sizes // config.crop_size).tolist(), masks, strict=True):
        seen = mask[1 : 1 + down * across, ::2, ::2].unflatten(0, (down, across))
        height, width, side = int(seen[:, 0, :, 0].sum()), int(seen[0, :, 0].sum()), seen.shape[-1]
        rows.append(height * (width + 1) + 1 + side * (side + 1))
    arguments = {"image_pixel_values": pixels, "image_sizes": sizes, "image_attention_mask": masks}
    embed = base.embed_tokens_extend.image_embed
    features = _embedded(embed, config.image_token_id, sum(rows), base.config.hidden_size, pixels, **arguments)
    return BaseModelOutputWithPooling(pooler_output=features.split(rows))  # type: ignore[arg-type]  # one for each item


def phi4_sounds(base: Any, items: Sequence[MediaData]) -> Any:
    """Encodes each sound alone. Items are dicts: "input_features" of the shape (columns, bands); "beside_images", (),
    whether the sample of the sound also has images, as the model then projects it in another way; and, of a sound that
    has been filled up or that has others beside it, "input_features_mask" (columns,), which tells it from padding."""
    config, rows = base.config.audio_config, list[Tensor]()
    for item in items:
        if isinstance(item, Tensor) or not item.keys() >= {"input_features", "beside_images"}:
            raise ValueError(
                'this model needs sounds as {"input_features": ..., "beside_images": ...}, as it projects a sound in '
                "another way if its sample also has images: the DataModule must say there whether it has any"
            )
        features, mask = item["input_features"], item.get("input_features_mask")
        columns = len(features) if mask is None else int(mask.bool().sum())
        sizes = [-(-columns // config.time_reduction)]
        given = {
            "audio_input_features": features[None],
            "audio_embed_sizes": sizes,
            "audio_attention_mask": None if mask is None else mask[None].bool(),
            "audio_projection_mode": "vision" if item["beside_images"] else "speech",
        }
        embed = base.embed_tokens_extend.audio_embed
        rows.append(_embedded(embed, config.audio_token_id, sizes[0], base.config.hidden_size, features, **given))
    return BaseModelOutputWithPooling(pooler_output=rows)  # type: ignore[arg-type]  # a tensor for each item


def _embedded(embed: Any, token: int, rows: int, width: int, like: Tensor, **given: Any) -> Tensor:
    """The features of Phi-4-multimodal, (rows, D), which its towers put in the places of tokens among embeddings."""
    ids = torch.full((1, rows), token, device=like.device)
    return embed(ids, like.new_zeros(1, rows, width), **given)[0]
