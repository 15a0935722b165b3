"""Diffusion transformers of the diffusers library, each as one function: noisy targets, time, conditions -> velocity.

The velocity is that of x_s = (1 - s) * x_0 + s * noise, which is noise - x_0. Some classes have another convention for
time or direction, which their function converts.

Shape suffixes: B items, C channels, H and W pixels (or latent cells), T patches, N condition rows, E width of the
conditions.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_lumina2 import Lumina2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from bigmac_lightning.estimates.forward_cost import ForwardCost, attention_cost, forward_cost

Velocity = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(transformer, x_BCHW, s_B in [0, 1], conditions_BNE) -> velocity_BCHW"""


@dataclass(frozen=True)
class DiffusionTransformer:
    """One kind of transformer.

    Attributes:
        model: the class of the transformer.
        condition_width: the name of the class's argument that is E.
        velocity: runs the transformer.
        channels: gives the arguments of the class that follow from channels and patch size.
        unused: modules of the last block whose outputs go nowhere; they would never get a gradient.
        tuples: names of arguments that must be tuples.
        joint: the beginning of the names of modules that get patches and conditions as one sequence.
        attended: gives the multiplications of attention for config, patches and conditions; ``None``: in all blocks,
            patches and conditions attend to both.
    """

    model: type[Any]
    condition_width: str
    velocity: Velocity
    channels: Callable[[int, int], dict[str, int]] = lambda channels, patch_size: {
        "in_channels": channels,
        "out_channels": channels,
    }
    unused: Sequence[str] = ()
    tuples: Sequence[str] = ()
    joint: str = "-"
    attended: Callable[[Any, int, int], float] | None = None

    def arguments(self, width: int, channels: int, patch_size: int, config: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the class: those given, and those that follow from the target and the LLM's width."""
        config = {name: tuple(value) if name in self.tuples else value for name, value in config.items()}
        config.setdefault(self.condition_width, width)
        if self.model is SD3Transformer2DModel:
            heads = config.get("num_attention_heads", 18) * config.get("attention_head_dim", 64)
            # Conditions are projected to the width of patches, and their mean takes the place of the pooled text.
            config = {"caption_projection_dim": heads, **config, "pooled_projection_dim": config[self.condition_width]}
        return {"patch_size": patch_size, **self.channels(channels, patch_size), **config}

    def cost(self, transformer: Any, patches: int, conditions: int) -> ForwardCost:
        """The cost of the forward for an item."""

        def rows(name: str) -> int:
            if _PER_ITEM.search(name):
                return 1
            if name.startswith(self.joint):
                return patches + conditions
            return conditions if _OF_CONDITIONS.search(name) else patches

        depth, width = self.depth_and_width(transformer)
        if self.attended is not None:
            seen = ForwardCost(self.attended(transformer.config, patches, conditions))
        else:
            seen = attention_cost(width, patches + conditions, patches + conditions) * depth
        return forward_cost(transformer, rows) + seen

    @staticmethod
    def depth_and_width(transformer: Any) -> tuple[int, int]:
        """The number of blocks, and the width of a patch inside."""
        config = transformer.config
        width = config.get("hidden_size") or config.num_attention_heads * config.attention_head_dim
        return config.num_layers, width


_PER_ITEM = re.compile(r"time|_mod\.|norm\w*\.linear|adaln")
_OF_CONDITIONS = re.compile(r"add_|txt_|context|caption|attn2\.to_[kv]")
"""The parameters that are used once for an item, and those that get conditions; all others get patches."""


def _qwen_image(transformer: Any, x_BCHW: Tensor, s_B: Tensor, conditions_BNE: Tensor) -> Tensor:
    p, channels = transformer.config.patch_size, x_BCHW.shape[1]
    height, width = x_BCHW.shape[2] // p, x_BCHW.shape[3] // p
    patches_BTE = x_BCHW.unflatten(3, (width, p)).unflatten(2, (height, p))
    patches_BTE = patches_BTE.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    shapes = [[(1, height, width)]] * len(x_BCHW)
    with torch.inference_mode(False):  # it caches tables, and those made in a validation must serve training, too
        transformer.pos_embed(shapes, max_txt_seq_len=conditions_BNE.shape[1], device=x_BCHW.device)
    patches_BTE = transformer(
        hidden_states=patches_BTE.to(conditions_BNE.dtype),
        encoder_hidden_states=conditions_BNE,
        timestep=s_B,
        img_shapes=shapes,
    ).sample
    grid = patches_BTE.unflatten(1, (height, width)).unflatten(3, (channels, p, p))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _sd3(transformer: Any, x_BCHW: Tensor, s_B: Tensor, conditions_BNE: Tensor) -> Tensor:
    return transformer(
        hidden_states=x_BCHW.to(conditions_BNE.dtype),
        encoder_hidden_states=conditions_BNE,
        pooled_projections=conditions_BNE.mean(1),
        timestep=s_B * 1000,
    ).sample


def _sana(transformer: Any, x_BCHW: Tensor, s_B: Tensor, conditions_BNE: Tensor) -> Tensor:
    return transformer(
        hidden_states=x_BCHW.to(conditions_BNE.dtype), encoder_hidden_states=conditions_BNE, timestep=s_B * 1000
    ).sample


def _sana_attention(config: Any, patches: int, conditions: int) -> float:
    """The multiplications of linear attention between patches and of ordinary attention to the conditions."""
    linear = 2 * config.num_attention_heads * config.attention_head_dim**2 * patches
    crossed = 2 * config.num_cross_attention_heads * config.cross_attention_head_dim * patches * conditions
    return config.num_layers * (linear + crossed)


def _lumina2(transformer: Any, x_BCHW: Tensor, s_B: Tensor, conditions_BNE: Tensor) -> Tensor:
    mask_BN = torch.ones(conditions_BNE.shape[:2], dtype=torch.bool, device=conditions_BNE.device)
    out = transformer(
        hidden_states=x_BCHW.to(conditions_BNE.dtype),
        encoder_hidden_states=conditions_BNE,
        encoder_attention_mask=mask_BN,
        timestep=1 - s_B,
    )
    return -out.sample  # here time and velocity run from noise to image


TRANSFORMERS = {
    "qwen_image": DiffusionTransformer(
        QwenImageTransformer2DModel,
        "joint_attention_dim",
        _qwen_image,
        lambda channels, patch_size: {"in_channels": channels * patch_size**2, "out_channels": channels},
        ["attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp"],
        ["axes_dims_rope"],
    ),
    "sd3": DiffusionTransformer(
        SD3Transformer2DModel, "joint_attention_dim", _sd3, unused=["attn.add_q_proj", "attn.norm_added_q"]
    ),
    "sana": DiffusionTransformer(SanaTransformer2DModel, "caption_channels", _sana, attended=_sana_attention),
    "lumina2": DiffusionTransformer(
        Lumina2Transformer2DModel, "cap_feat_dim", _lumina2, tuples=["axes_dim_rope", "axes_lens"], joint="layers."
    ),
}
