"""A SigLIP vision tower and a projector as an `Encoder`: images to rows of the LLM's width, one row per patch.

Knows images and batches of them; knows nothing of tokens, microbatches or ranks.

Shape suffixes: B images, C channels, H and W pixels, T patches of an image, E width of the tower, D width of the LLM,
N rows of all images.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, SiglipVisionConfig, SiglipVisionModel

from bigmac_lightning.module import Encoder

from .initialization import allocate_and_initialize, seeded, to_config


class VisionEncoder(Encoder):
    """SigLIP's vision transformer without its pooling head, then a linear layer or a two-layer perceptron.

    An image (C, H, W) becomes (H / patch_size) * (W / patch_size) rows, top left to bottom right; a video (T, C, H, W)
    the rows of its frames, each encoded by itself. Images of other sizes than the config's `image_size` are encoded
    with interpolated position embeddings.

    Attributes:
        tower: the vision transformer.
        projector: from its width to the LLM's. To train it alone, freeze "encoders.<name>.tower".
    """

    def __init__(
        self,
        config: dict[str, Any] | str | PreTrainedConfig,
        width: int,
        projector_hidden: int | None = None,
        seed: int = 0,
        attn_implementation: str = "sdpa",
    ) -> None:
        """
        Args:
            config: ``{"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 2, ...}``; or the folder or
                name of a pretrained model, of which the config alone is read; or a ready config.
            width: D, of the LLM.
            projector_hidden: width of the projector's hidden layer; ``None``: a single linear layer.
            seed: of the initial weights.
            attn_implementation: "sdpa", "eager", "flash_attention_2", ...
        """
        super().__init__()
        self.config = copy.deepcopy(to_config(config))
        if not isinstance(self.config, SiglipVisionConfig):
            raise ValueError(
                f'VisionEncoder needs model_type "siglip_vision_model", not {self.config.model_type!r}; '
                "for another tower write an Encoder of your own"
            )
        self.config.vision_use_head = False  # its weights would never get a gradient
        self.config._attn_implementation = attn_implementation
        with torch.device("meta"):
            self.tower = SiglipVisionModel(self.config)
        allocate_and_initialize(self.tower, seed)
        tower_width = self.config.hidden_size
        with seeded(seed, "projector"):
            if projector_hidden is None:
                self.projector: nn.Module = nn.Linear(tower_width, width)
            else:
                hidden = nn.Linear(tower_width, projector_hidden)
                self.projector = nn.Sequential(hidden, nn.GELU(), nn.Linear(projector_hidden, width))

    def forward(self, pixels: list[Tensor]) -> Tensor:
        images = [image for item in pixels for image in (item if item.ndim == 4 else item[None])]
        of_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            of_size.setdefault(image.shape, []).append(i)
        rows: dict[int, Tensor] = {}
        for indices in of_size.values():
            images_BCHW = torch.stack([images[i] for i in indices])
            patches_BTE = self.tower(pixel_values=images_BCHW, interpolate_pos_encoding=True).last_hidden_state
            rows.update(zip(indices, self.projector(patches_BTE).unbind(), strict=True))
        return torch.cat([rows[i] for i in range(len(images))])
