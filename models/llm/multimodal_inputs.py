"""Inputs of LLMs that treat image tokens in a way of their own: M-RoPE, Gemma 3's two-way images, deepstack features.

Every rank computes them from what all ranks have: token ids, text positions and the grids of the media items.

Shape suffixes: B samples, S tokens, D width of the LLM.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma4 import modeling_gemma4

from .attention import sample_bounds

GRIDS = ("image_grid_thw", "video_grid_thw")


def multimodal_positions(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """M-RoPE positions (4, B, S): text, then temporal, height and width.

    The positions of an image depend on those before it in its sample (Qwen2-VL, arXiv 2409.12191, section 2.1), so each
    sample of a packed row is given to the library's own function alone.

    Args:
        model: a Qwen vision-language model, whose `get_rope_index` is used, but none of its weights.
        inputs: ``input_ids`` and ``position_ids`` (B, S); ``image_grid_thw``, ``video_grid_thw`` (items, 3) where there
            are such items, in the order of their tokens; ``second_per_grid_ts`` (videos,) if known.

    Raises:
        ValueError: the grids do not fit the tokens.
    """
    text_BS, ids_BS = inputs["position_ids"], inputs["input_ids"]
    config = model.config
    kinds_BS = (ids_BS == config.image_token_id).int() + 2 * (ids_BS == config.video_token_id).int()
    positions = text_BS.expand(4, *text_BS.shape).clone()
    if not kinds_BS.any():
        return positions
    queues = [_Grids(name, inputs.get(name), config.vision_config.spatial_merge_size) for name in GRIDS]
    seconds = inputs.get("second_per_grid_ts")
    for b, start, stop in ((b, *bounds) for b, row in enumerate(text_BS) for bounds in sample_bounds(row)):
        kinds_S = kinds_BS[b, start:stop]
        given = {queue.name: queue.take(int((kinds_S == kind).sum())) for kind, queue in enumerate(queues, 1)}
        if seconds is not None:
            videos = given["video_grid_thw"]
            taken = 0 if videos is None else len(videos)
            given["second_per_grid_ts"], seconds = seconds[:taken], seconds[taken:]
        ids_1S = ids_BS[b : b + 1, start:stop]
        found, _ = model.get_rope_index(input_ids=ids_1S, mm_token_type_ids=kinds_S[None], **given)
        positions[1:, b, start:stop] = found[:, 0]
    for queue in queues:
        queue.check_empty()
    return positions


def gemma3_masks(config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Masks by layer type. They are causal, except that all tokens of an image see each other."""
    return _image_masks(modeling_gemma3, config, h_BSD, inputs)


def gemma4_masks(config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """As `gemma3_masks`, but only for sliding attention."""
    return _image_masks(modeling_gemma4, config, h_BSD, inputs)


def _image_masks(library: Any, config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> dict[str, Any]:
    blocks = library.get_block_sequence_ids_for_mask(inputs["token_type_ids"], device=h_BSD.device)
    return library.create_masks_for_vision_model(
        config.get_text_config(),
        h_BSD,
        inputs.get("attention_mask"),
        None,
        inputs.get("position_ids"),
        block_sequence_ids=blocks,
    )


def text_positions(positions: Tensor) -> Tensor:
    """The text positions (B, S) in positions of shape (B, S), or (4, B, S), where text positions come first.

    Raises:
        ValueError: the positions have another shape.
    """
    if positions.ndim == 2:
        return positions
    if positions.ndim == 3 and len(positions) == 4:
        return positions[0]
    raise ValueError(
        f"inputs['position_ids'] has shape {tuple(positions.shape)}: give (B, S), starting anew at each sample of "
        "a row, or (4, B, S): these, then temporal, height and width positions"
    )


def deepstack_arguments(features: Tensor, positions_N: Tensor, h_BSD: Tensor, layers: range) -> dict[str, Any]:
    """The arguments with which Qwen3-VL adds features after each of its first layers. The decoder looks the features up
    by the index of the layer, so layers of earlier stages get zeros.

    Args:
        features: the features of the levels that have not been added yet, (levels, N, D).
        positions_N: the tokens that they belong to, as flat indices into B * S.
        layers: the layers of the stage.
    """
    mask_BS = torch.zeros(h_BSD.shape[:2], dtype=torch.bool, device=h_BSD.device)
    mask_BS.view(-1)[positions_N] = True
    features = features[: len(layers), positions_N.argsort()]
    nothing = torch.zeros_like(features[0])
    return {"visual_pos_masks": mask_BS, "deepstack_visual_embeds": [*[nothing] * layers.start, *features]}


class _Grids:
    """The grids of the images, or of the videos, which are taken sample by sample."""

    def __init__(self, name: str, grids: Tensor | None, merge: int) -> None:
        self.name, self.merge = name, merge
        self.left = [] if grids is None else list(grids)

    def take(self, tokens: int) -> Tensor | None:
        """The next grids, which together have this number of tokens."""
        taken: list[Tensor] = []
        while tokens > 0 and self.left:
            taken.append(self.left.pop(0))
            tokens -= int(taken[-1].prod()) // self.merge**2
        if tokens != 0:
            raise ValueError(
                f"a sample's image or video tokens do not fit the grids in inputs[{self.name!r}]: the DataModule must "
                "give each item's (t, h, w) in patches there, in the order of their tokens, without gaps"
            )
        return torch.stack(taken) if taken else None

    def check_empty(self) -> None:
        if self.left:
            raise ValueError(f"inputs[{self.name!r}] has {len(self.left)} items more than there are tokens for")
