"""Features that layers of the LLM take besides the embeddings, which travel to these layers with the hidden states.

Shape suffixes: B samples, S tokens, N media tokens, D width of the LLM.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deepstack:
    """How the decoders of a family take such features.

    Attributes:
        layers: the layers that take some, of the model's config, in ascending order.
        arguments: the arguments of the decoder, of mask_BS (the tokens that the features belong to) and features_ND by
            layer.
    """

    layers: Callable[[Any], Sequence[int]]
    arguments: Callable[[Tensor, dict[int, Tensor]], dict[str, Any]]

    def take(
        self, layers: Sequence[int], stage: range, features: Tensor, positions_N: Tensor, h_BSD: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """The arguments for a stage, and the features that later ones take.

        Args:
            layers: the layers that take features.
            stage: the layers of the stage.
            features: those of the layers that have not run yet, (levels, N, D).
            positions_N: the tokens that they belong to, as flat indices into B * S.
        """
        mask_BS = torch.zeros(h_BSD.shape[:2], dtype=torch.bool, device=h_BSD.device)
        mask_BS.view(-1)[positions_N] = True
        here = [k for k in layers if k in stage][: len(features)]
        taken = dict(zip(here, features[: len(here), positions_N.argsort()], strict=True))
        return self.arguments(mask_BS, taken) if taken else {}, features[len(here) :]


def _first_layers(config: Any) -> Sequence[int]:
    return range(len(config.vision_config.deepstack_visual_indexes))


def _by_index(mask_BS: Tensor, features: dict[int, Tensor]) -> dict[str, Any]:
    """The decoder looks features up by the index of the layer, so layers of earlier stages get zeros."""
    nothing = torch.zeros_like(next(iter(features.values())))
    given = [features.get(k, nothing) for k in range(max(features) + 1)]
    return {"visual_pos_masks": mask_BS, "deepstack_visual_embeds": given}


def named_layers(config: Any) -> Sequence[int]:
    """The layers that the config of Granite 4 Vision names, as far as there are so many."""
    named = {layer for _, layer in config.deepstack_layer_map} | set(config.spatial_target_layers)
    return [layer for layer in sorted(named) if layer < config.get_text_config().num_hidden_layers]


def _by_name(mask_BS: Tensor, features: dict[int, Tensor]) -> dict[str, Any]:
    return {"vision_mask": mask_BS[..., None], "deepstack_features": features}


FIRST_LAYERS = Deepstack(_first_layers, _by_index)
"""Qwen3-VL: the first layers take features, which are added after them."""
NAMED_LAYERS = Deepstack(named_layers, _by_name)
"""Granite 4 Vision: features are added before the layers that its config names."""
