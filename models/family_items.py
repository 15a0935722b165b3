"""How media items become the arguments of the `get_*_features` of vision- and audio-language models.

What a family does with its items is one function here, or in family_sounds.py or phi4_items.py. The table of families
is in families.py, and smallest_items.py makes small items.

Shape suffixes: C channels, H and W pixels, T patches, E values of a patch, N rows of an item, D width of the LLM.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bigmac_lightning.contracts.batch import MediaData

from .llm.deepstack import named_layers

Encode = Callable[[Any, Sequence[Any]], Any]
"""Makes of the base model (tower, projector) and of items the output of its `get_*_features`."""


def patches(base: Any, items: Sequence[Tensor]) -> Any:
    """Items have the shape (t, h, w, E): the processor's patches in its order, on the grid that they come from."""
    return base.get_image_features(*_on_grid(items), return_dict=True)


def video_patches(base: Any, items: Sequence[Tensor]) -> Any:
    """As `patches`, where the model encodes videos in another way than images."""
    return base.get_video_features(*_on_grid(items), return_dict=True)


def _on_grid(items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    grid = torch.tensor([item.shape[:3] for item in items], device=items[0].device)
    return torch.cat([item.flatten(0, 2) for item in items]), grid


def flat_patches(base: Any, items: Sequence[Tensor]) -> Any:
    """As `patches`, of images with t = 1 alone."""
    base.vision_model.config.dtype = base.dtype  # to which the model converts pixels
    pixels, grid = _on_grid(items)
    return base.get_image_features(pixels, grid[:, 1:], return_dict=True)


def patches_alone(base: Any, items: Sequence[Tensor]) -> Any:
    """Items have the shape (T, frames, side, side, C): the patches of an image, each of which becomes a row."""
    out = base.get_image_features(torch.cat(list(items)), return_dict=True)
    out.pooler_output = out.pooler_output.flatten(0, 1).split([len(item) for item in items])
    return out


def square_patches(base: Any, items: Sequence[Tensor]) -> Any:
    """As `patches`, but the model takes patches of the shape (C, side, side)."""
    grid = torch.tensor([item.shape[:3] for item in items], device=items[0].device)
    side = base.config.vision_config.patch_size
    patches = torch.cat([item.flatten(0, 2) for item in items]).unflatten(-1, (-1, side, side))
    return base.get_image_features(patches, grid, return_dict=True)


def padded_patches(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (T, E) or (tiles, T, E), where T is the most patches that a tile can
    have; "spatial_shapes", the grids of the tiles, (2,) or (tiles, 2); and "pixel_attention_mask", (T,) or (tiles, T),
    which tells patches from padding."""
    names = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    given = {name: torch.cat([_tiled(item, name) for item in items]) for name in names}
    return base.get_image_features(**given, return_dict=True)


def _tiled(item: MediaData, name: str) -> Tensor:
    value, several = dicts([item], name)[0][name], 3 if name == "pixel_values" else 2  # dimensions, with that of tiles
    return value if value.ndim == several else value[None]


def padded_images(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (T, E), where T is the same for all images, and
    "image_position_ids", the places of the patches in the picture, (T, 2); -1 for padding."""
    given = dicts(items, "image_position_ids")
    pixels, places = (torch.stack([item[name] for item in given]) for name in ("pixel_values", "image_position_ids"))
    return base.get_image_features(pixels, places, return_dict=True)


def padded_frames(base: Any, items: Sequence[MediaData]) -> Any:
    """As `padded_images`, with a dimension of frames before all others."""
    given = dicts(items, "image_position_ids")
    pixels, places = (torch.cat([item[name] for item in given]) for name in ("pixel_values", "image_position_ids"))
    frames = torch.tensor([len(pixels_of(item)) for item in items])
    return base.get_video_features(pixels, places, num_frames_per_video=frames, return_dict=True)


def crops(base: Any, items: Sequence[Tensor]) -> Any:
    """Items have the shape (C, H, W), or (crops, C, H, W)."""
    return base.get_image_features(torch.cat([_with_crops(item) for item in items]), return_dict=True)


def batched_crops(base: Any, items: Sequence[Tensor]) -> Any:
    """As `crops`, but the model takes a dimension of items before that of crops."""
    return base.get_image_features(torch.stack([_with_crops(item) for item in items]), return_dict=True)


def sized(base: Any, items: Sequence[MediaData]) -> Any:
    """Items have the shape (C, H, W) or (1, C, H, W), with any H and W."""
    pixels = torch.cat([_with_crops(pixels_of(item)) for item in items])
    return base.get_image_features(pixels, image_sizes=_sizes(items), return_dict=True)


def any_resolution(base: Any, items: Sequence[MediaData]) -> Any:
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


def cut_into_crops(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (crops, C, H, W), and "image_sizes", the picture's own size, by
    which the model puts the crops together."""
    if not all(isinstance(item, dict) for item in items):
        raise ValueError(
            'this model needs images as {"pixel_values": crops, "image_sizes": (height, width)}, as its processor '
            "makes them"
        )
    pixels = torch.stack([pixels_of(item) for item in items])
    return base.get_image_features(pixels, _sizes(items), return_dict=True)


def crops_for_layers(base: Any, items: Sequence[MediaData]) -> Any:
    """As `cut_into_crops`, where layers of the LLM take all features, and the embeddings are zero."""
    out = cut_into_crops(base, items)
    by_layer = dict(out.deepstack_features)  # of several for a layer the model takes the last
    out.deepstack_features = [by_layer[layer] for layer in named_layers(base.config)]
    out.pooler_output = [torch.zeros_like(rows) for rows in next(iter(by_layer.values()))]
    return out


def pooled_video(base: Any, items: Sequence[Tensor]) -> Any:
    """Items have the shape (frames, C, H, W)."""
    return base.get_video_features(torch.stack(list(items)), return_dict=True)


def merged_patches(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (t, h, w, E), the processor's patches on their grid, and
    "merge_sizes", the side of the squares of patches that become a row, (). Of a video that the processor has
    compressed, "compression_mask" (rows,) tells which rows are used."""
    given = dicts(items, "merge_sizes")
    pixels, grid = _on_grid([item["pixel_values"] for item in given])
    sizes = torch.stack([item["merge_sizes"].reshape(()) for item in given]).to(grid.device)
    out = base.get_image_features(pixels, grid, sizes, return_dict=True)
    masks = [item.get("compression_mask") for item in given]
    rows = zip(out.pooler_output, masks, strict=True)
    out.pooler_output = [part if mask is None else part[mask.to(part.device).bool()] for part, mask in rows]
    return out


def strips(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (C, side, patches * side), or (1, C, side, patches * side), with
    the patches of all slices of an image, or of all frames of a video, one after another; and "target_sizes", the grids
    of the slices or frames, (slices, 2)."""
    sizes = [item["target_sizes"] for item in dicts(items, "target_sizes")]
    out = base.get_image_features(torch.cat([_with_crops(pixels_of(item)) for item in items], -1), torch.cat(sizes))
    slices = iter(out.pooler_output)
    out.pooler_output = [torch.cat(list(islice(slices, len(own)))) for own in sizes]
    return out


def with_local_crops(base: Any, items: Sequence[MediaData]) -> Any:
    """Items have the shape (C, H, W), or are dicts: such "pixel_values" of the whole image, and "pixel_values_local" of
    its crops, (crops, C, h, w), if it has any. Unlimited-OCR also needs "patches_grid", (2,), which says how many crops
    lie across and down."""
    local = [None if isinstance(item, Tensor) else item.get("pixel_values_local") for item in items]
    given = [crops for crops in local if crops is not None and len(crops)]
    pixels = torch.cat([_with_crops(pixels_of(item)) for item in items])
    numbers = [0 if crops is None else len(crops) for crops in local]
    grids = [[] if isinstance(item, Tensor) else item.get("patches_grid", torch.tensor([])).tolist() for item in items]
    further = {"patches_grid": grids} if any(grids) else {}
    return base.get_image_features(pixels, torch.cat(given) if given else None, numbers, **further, return_dict=True)


def two_resolutions(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: the same image as "pixel_values" and as "high_res_pixel_values", (C, H, W) or (1, C, H, W)."""
    given = dicts(items, "high_res_pixel_values")
    pixels = (
        torch.cat([_with_crops(item[name]) for item in given]) for name in ("pixel_values", "high_res_pixel_values")
    )
    return base.get_image_features(*pixels, return_dict=True)


def masked(base: Any, items: Sequence[MediaData]) -> Any:
    """Items have the shape (C, H, W) or (crops, C, H, W), or are dicts: such "pixel_values", and "pixel_mask", (H, W)
    or (crops, H, W), which tells the picture from padding."""
    pixels = torch.cat([_with_crops(pixels_of(item)) for item in items])
    masks = None
    if not isinstance(items[0], Tensor):
        given = [item["pixel_mask"] for item in dicts(items, "pixel_mask")]
        masks = torch.cat([mask if mask.ndim == 3 else mask[None] for mask in given]).bool()
    layer = base.config.vision_feature_layer
    return base.get_image_features(pixels, masks, vision_feature_layer=layer, return_dict=True)


def with_indicators(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (crops, C, H, W), and "indicators" (rows,), which says of each row
    that the image becomes which of the model's visual indicators it is; -1: a feature."""
    given = dicts(items, "indicators")
    pixels = [_with_crops(item["pixel_values"]) for item in given]
    out = base.get_image_features(torch.cat(pixels), return_dict=True)
    crops, learned = iter(out.pooler_output), out.visual_indicator_features
    made = list[Tensor]()
    for item, own in zip(given, pixels, strict=True):
        rows = torch.cat([learned, *islice(crops, len(own))])
        features = item["indicators"] < 0
        made.append(rows[torch.where(features, features.cumsum(0) - 1 + len(learned), item["indicators"])])
    out.pooler_output = made
    return out


def pooled_patches(name: str) -> Encode:
    """Items are dicts: "pixel_values" of the shape (crops, patches, E); "image_token_pooling" (rows, most patches of a
    row), which patches of the item a row is made of, -1 where these are fewer; and "image_grids", (4,), or for a video
    "video_grids", (3,).

    Args:
        name: "image" or "video".
    """

    def encode(base: Any, items: Sequence[MediaData]) -> Any:
        given = dicts(items, f"{name}_token_pooling")
        pixels, pooling, before = [item["pixel_values"] for item in given], list[Tensor](), 0
        for item, own in zip(given, pixels, strict=True):
            chosen = item[f"{name}_token_pooling"]
            pooling.append(torch.where(chosen < 0, chosen, chosen + before))
            before += own.shape[0] * own.shape[1]
        get = base.get_image_features if name == "image" else base.get_video_features
        grids = torch.stack([item[f"{name}_grids"] for item in given])
        return get(torch.cat(pixels), torch.cat(pooling), grids, return_dict=True)

    return encode


def tiles(base: Any, items: Sequence[Tensor]) -> Any:
    """As `batched_crops`, but the model also takes which crops there are."""
    pixels = torch.stack([_with_crops(item) for item in items])
    present = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device)
    return base.get_image_features(pixels, present, return_dict=True)


def filled_tiles(base: Any, items: Sequence[MediaData]) -> Any:
    """Items are dicts: "pixel_values" of the shape (most tiles, C, H, W), filled up with zeros; "aspect_ratio_ids", (),
    the number of their arrangement; and "aspect_ratio_mask" (most tiles,), which is 1 for tiles of the picture."""
    given = dicts(items, "aspect_ratio_ids")
    pixels, numbers, masks = (
        torch.stack([item[name] for item in given])[:, None]
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    )
    out = base.vision_model(pixels, numbers, masks)
    return BaseModelOutputWithPooling(pooler_output=base.multi_modal_projector(out.last_hidden_state).flatten(1, -2))


def projected_later(base: Any, items: Sequence[Tensor]) -> Any:
    """As `crops`, but the model's own forward calls its projector."""
    out = base.get_image_features(torch.cat([_with_crops(item) for item in items]), return_dict=True)
    out.pooler_output = base.multi_modal_projector(out.last_hidden_state)
    return out


def dicts(items: Sequence[MediaData], name: str) -> list[dict[str, Tensor]]:
    """
    Raises:
        ValueError: an item has no such part.
    """
    found = [item for item in items if isinstance(item, dict) and name in item]
    if len(found) < len(items):
        raise ValueError(
            f'this model needs images as {{"pixel_values": ..., "{name}": ...}}, as its processor makes them'
        )
    return found


def _with_crops(item: Tensor) -> Tensor:
    return item if item.ndim == 4 else item[None]


def pixels_of(item: MediaData) -> Tensor:
    """The pixels of an item, or the spectrograms of a sound.

    Raises:
        ValueError: it has neither.
    """
    if isinstance(item, Tensor):
        return item
    for name in ("pixel_values", "input_features"):
        if name in item:
            return item[name]
    raise ValueError(
        f"an item has {sorted(item)}, but the encoders of pretrained models take pixel_values of an image or video, or "
        "input_features and input_features_mask of a sound"
    )


def _sizes(items: Sequence[MediaData]) -> Tensor:
    """The height and width of each image, (items, 2); those of its pixels if it has no `image_sizes`."""
    sizes = [torch.tensor(i.shape[-2:]) if isinstance(i, Tensor) else i["image_sizes"] for i in items]
    return torch.stack([size.to(pixels_of(items[0]).device) for size in sizes])


def hunyuan_rows(config: Any, kind: str, grid: Sequence[int]) -> int:
    """Each line of rows ends with one more, and two stand around the image."""
    side = config.vision_config.spatial_merge_size
    return grid[1] // side * (grid[2] // side + 1) + 2


def ernie_rows(config: Any, kind: str, grid: Sequence[int]) -> int:
    """Of a video, several time steps are joined as well."""
    vision = config.vision_config
    steps = grid[0] // vision.temporal_merge_size if kind == "video" else grid[0]
    return steps * grid[1] * grid[2] // vision.spatial_merge_size**2
