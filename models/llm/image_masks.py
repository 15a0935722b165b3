"""Masks by which tokens of images, or of prompts, see each other both ways; apart from that they are causal.

Shape suffixes: B samples, S tokens, D width of the LLM.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma4 import modeling_gemma4

from bigmac_lightning.contracts.batch import PROMPT_TOKENS


def token_kinds(inputs: dict[str, Tensor], images: Sequence[int], sees_prompts: bool) -> Tensor:
    """The input "token_type_ids" (B, S) of the library: 1 for tokens of images; or, if all tokens of a prompt see each
    other, 0 for these and 1 for those after them.

    Args:
        images: the ids of tokens of images and videos.
    """
    ids_BS = inputs["input_ids"]
    if not sees_prompts:
        return torch.stack([ids_BS == token for token in images]).any(0).long()
    prompt_B1 = inputs.get(PROMPT_TOKENS, ids_BS.new_zeros(len(ids_BS)))[:, None]
    return (torch.arange(ids_BS.shape[1], device=ids_BS.device) >= prompt_B1).long()


def gemma3_masks(config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
    """Masks by layer type: all tokens of an image see each other."""
    return _library_masks(modeling_gemma3, config, h_BSD, inputs)


def gemma4_masks(config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
    """As `gemma3_masks`, but only in layers with sliding attention."""
    return _library_masks(modeling_gemma4, config, h_BSD, inputs)


def masks_of_each_image(config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
    """As `gemma3_masks`, of the forward of Gemma 4 Unified; the library's `generate` gives it the masks of Gemma 4."""
    blocks = modeling_gemma4.get_block_sequence_ids_for_mask(inputs["token_type_ids"], device=h_BSD.device)
    return create_masks_for_generate(config.get_text_config(), h_BSD, *_given(inputs), block_sequence_ids=blocks)


def masks_of_all_images(config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
    """One mask: the tokens of all images of a row see each other (Molmo 2)."""
    blocks = torch.where(inputs["token_type_ids"] == 1, 0, -1)
    return create_causal_mask(config.get_text_config(), h_BSD, *_given(inputs), block_sequence_ids=blocks)


def masks_of_prompts(config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
    """Masks by layer type: the tokens of a prompt, in which images are, see each other."""
    blocks = torch.where(inputs["token_type_ids"] == 0, 0, -1)
    made = (config.get_text_config(), h_BSD, *_given(inputs))
    masks = create_causal_mask(*made, block_sequence_ids=blocks)
    if getattr(made[0], "sliding_window", None) is None:
        return masks
    sliding = create_sliding_window_causal_mask(*made, block_sequence_ids=blocks)
    return {"full_attention": masks, "sliding_attention": sliding}


def _library_masks(library: Any, config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
    blocks = library.get_block_sequence_ids_for_mask(inputs["token_type_ids"], device=h_BSD.device)
    config = config.get_text_config()
    return library.create_masks_for_vision_model(config, h_BSD, *_given(inputs), block_sequence_ids=blocks)


def _given(inputs: dict[str, Tensor]) -> tuple[Tensor | None, None, Tensor | None]:
    """The mask of padding, a cache, and positions."""
    return inputs.get("attention_mask"), None, inputs.get("position_ids")
