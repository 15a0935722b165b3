"""A vision tower with a projector as an `Encoder`, which turns images into rows of the LLM's width.

Shape suffixes: B images, C channels, H and W pixels, T patches of an image, E width of the tower, D width of the LLM,
N rows of all images.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from bigmac_lightning.estimates.forward_cost import ForwardCost, attention_cost, forward_cost

from ..initialization import to_config
from ..llm import attention
from ..projected_tower import ProjectedTower
from .hf_encoders import smallest_grid


@dataclass(frozen=True)
class _Tower:
    """What one kind of tower needs.

    Attributes:
        prefix: gives for a config the number of tokens before the patches (class token, registers).
        unused: modules and parameters that the patches' features do not depend on; they would never get a gradient.
        interpolates: whether the forward has an argument that lets it interpolate position embeddings.
    """

    prefix: Callable[[Any], int] = lambda config: 0
    unused: Sequence[str] = ()
    interpolates: bool = False


_TOWERS = {
    "siglip_vision_model": _Tower(interpolates=True),
    "clip_vision_model": _Tower(lambda config: 1, ["post_layernorm"], interpolates=True),
    "dinov2": _Tower(lambda config: 1, ["embeddings.mask_token"]),
    "dinov2_with_registers": _Tower(lambda config: 1 + config.num_register_tokens, ["embeddings.mask_token"]),
    "dinov3_vit": _Tower(lambda config: 1 + config.num_register_tokens, ["embeddings.mask_token"]),
}
_PATCH_TOWERS = {  # the towers of the Qwen models, with their merger: items are patches on a grid (t, h, w)
    "qwen2_5_vl_vision": _Tower(),
    "qwen3_vl_vision": _Tower(unused=["deepstack_merger_list"]),
}


class VisionEncoder(ProjectedTower):
    """A vision transformer without its pooling head, then a linear layer or a two-layer perceptron. Between the two,
    neighbouring patches may be merged.

    An image (C, H, W) becomes H * W / (patch_size * merge)^2 rows, from top left to bottom right. A video (T, C, H, W)
    becomes the rows of its frames, each of which is encoded by itself. Images of other sizes than the config's
    `image_size` are encoded with interpolated position embeddings. Qwen's towers take an item's patches,
    (t, h, w, values of a patch), and make t * h * w / spatial_merge_size^2 rows.

    Attributes:
        tower: the vision transformer: SigLIP (1 and 2), CLIP, DINOv2, DINOv3, or that of Qwen2.5-VL or Qwen3-VL.
    """

    def __init__(
        self,
        config: dict[str, Any] | str | PreTrainedConfig,
        width: int,
        projector_hidden: int | None = None,
        merge: int = 1,
        seed: int = 0,
        attn_implementation: str = "sdpa",
        weights: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            config: ``{"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 2, ...}``; or the folder or
                name of a pretrained model, of which only the config is read; or a ready config.
            width: the width of the LLM, D.
            projector_hidden: the width of the projector's hidden layer; ``None``: a single linear layer.
            merge: the side of the squares of patches whose features are joined into one row (pixel shuffle).
            seed: the seed of the initial weights.
            attn_implementation: see `HFDecoder`.
            weights: the folder of a checkpoint for the tower; ``None``: initial weights.
            gradient_checkpointing: whether to save only each layer's input for the backward and run the layer again.

        Raises:
            ValueError: the tower is not supported, or the attention implementation is not installed.
        """
        super().__init__()
        config = to_config(config)
        config = config.vision_config if "vision_config" in config.sub_configs else config
        self.config: Any = copy.deepcopy(config)
        kind = self.config.model_type
        known = {**_TOWERS, **_PATCH_TOWERS}
        if kind not in known:
            raise ValueError(
                f"VisionEncoder supports the towers {sorted(known)}, not model_type {kind!r}; "
                "for another tower write an Encoder of your own"
            )
        self.kind, self.takes_patches, self.merge = known[kind], kind in _PATCH_TOWERS, merge
        if self.takes_patches and merge > 1:
            raise ValueError(f"the tower {kind!r} merges patches itself: leave merge=1 (it is {merge})")
        if kind == "siglip_vision_model":
            self.config.vision_use_head = False  # the head's weights would never get a gradient
        if kind == "dinov3_vit":  # training would jitter positions at random, on each rank in another way
            self.config.pos_embed_shift = self.config.pos_embed_jitter = self.config.pos_embed_rescale = None
        tower_width = (self.config.out_hidden_size if self.takes_patches else self.config.hidden_size) * merge**2
        further = (seed, attn_implementation, weights, gradient_checkpointing)
        self._build(tower_width, width, projector_hidden, *further)
        self._freeze_unused()

    def forward_cost(self, rows: int) -> ForwardCost:
        """The cost for an item that is one picture, whose patches all see each other."""
        config = self.config
        side = config.spatial_merge_size if self.takes_patches else self.merge
        patches = rows * side**2 + self.kind.prefix(config)
        depth = config.depth if self.takes_patches else config.num_hidden_layers
        tower = forward_cost(self.tower, lambda name: rows if "merger" in name else patches)
        tower += attention_cost(config.hidden_size, patches, patches) * depth
        if self.gradient_checkpointing:
            tower = tower.checkpointed(depth, config.hidden_size, patches)
        return tower + forward_cost(self.projector, rows)

    def _freeze_unused(self) -> None:
        modules, parameters = dict(self.tower.named_modules()), dict(self.tower.named_parameters())
        for name in self.kind.unused:
            for unused in (n for n in (*modules, *parameters) if n == name or n.endswith(f".{name}")):
                (modules[unused] if unused in modules else parameters[unused]).requires_grad_(False)

    def forward(self, pixels: list[Tensor]) -> Tensor:
        attention.check_device(self.config._attn_implementation, pixels[0].device)
        if self.takes_patches:
            grid = torch.tensor([item.shape[:3] for item in pixels], device=pixels[0].device)
            patches = torch.cat([item.flatten(0, 2) for item in pixels])
            return self.projector(self.tower(patches, grid_thw=grid, return_dict=True).pooler_output)
        images = [image for item in pixels for image in (item if item.ndim == 4 else item[None])]
        of_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            of_size.setdefault(image.shape, []).append(i)
        rows: dict[int, Tensor] = {}
        for indices in of_size.values():
            images_BCHW = torch.stack([images[i] for i in indices])
            patches_BTE = self._merged(self._encode(images_BCHW), images_BCHW.shape[-2:])
            rows.update(zip(indices, self.projector(patches_BTE).unbind(), strict=True))
        return torch.cat([rows[i] for i in range(len(images))])

    def batches(self, pixels: Sequence[Tensor]) -> list[list[int]]:
        """Images of one size, and videos of frames of this size, are encoded together."""
        of_size: dict[torch.Size | None, list[int]] = {}
        for i, item in enumerate(pixels):
            of_size.setdefault(None if self.takes_patches else item.shape[-3:], []).append(i)
        return list(of_size.values())

    def smallest(self) -> Tensor:
        if self.takes_patches:
            return smallest_grid(self.config).to(self.input_dtype())
        side = self.config.patch_size * self.merge
        return torch.zeros(self.config.num_channels, side, side, dtype=self.input_dtype())

    def _encode(self, images_BCHW: Tensor) -> Tensor:
        further = {"interpolate_pos_encoding": True} if self.kind.interpolates else {}
        patches_BTE = self.tower(pixel_values=images_BCHW, **further).last_hidden_state
        return patches_BTE[:, self.kind.prefix(self.config) :]

    def _merged(self, patches_BTE: Tensor, size: torch.Size) -> Tensor:
        """Joins the features of each square of merge * merge patches."""
        side = self.merge
        if side == 1:
            return patches_BTE
        height, width = (pixels // self.config.patch_size for pixels in size)
        if height % side or width % side:
            raise ValueError(
                f"an image of {tuple(size)} pixels has {height} * {width} patches, which merge={side} does not divide: "
                f"resize images to multiples of {side * self.config.patch_size} pixels"
            )
        grid = patches_BTE.unflatten(1, (height // side, side, width // side, side))
        return grid.transpose(2, 3).flatten(3).flatten(1, 2)
