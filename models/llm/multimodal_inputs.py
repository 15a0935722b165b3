"""Inputs of LLMs that treat image tokens in a way of their own: M-RoPE, and vision tokens.

Every rank computes them from what all ranks have: token ids, text positions and the grids of the media items.

Shape suffixes: B samples, S tokens, D width of the LLM.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..families import Family
from .attention import sample_bounds

KINDS = ("image", "video")
GRIDS = ("image_grid_thw", "video_grid_thw")


def position_axes(config: PreTrainedConfig) -> int:
    """Rows of M-RoPE positions beside those of text: 3, or 4 in Hunyuan-VL with four sections."""
    rope: Any = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or (1, 1, 1))


def multimodal_positions(model: Any, inputs: dict[str, Tensor], family: Family) -> Tensor:
    """M-RoPE positions (4, B, S): text, then temporal, height and width (or other axes; see `position_axes`).

    The positions of an image depend on those before it in its sample (Qwen2-VL, arXiv 2409.12191, section 2.1), so each
    sample of a packed row is given to the library's own function alone.

    Args:
        model: a Qwen vision-language model, whose `get_rope_index` is used, but none of its weights.
        inputs: ``input_ids`` and ``position_ids`` (B, S); ``image_grid_thw``, ``video_grid_thw`` (items, 3) where there
            are such items, in the order of their tokens; ``second_per_grid_ts`` (videos,) if known.
        family: says how many rows a grid has.

    Raises:
        ValueError: the grids do not fit the tokens, or a video has sounds between its frames.
    """
    text_BS, ids_BS = inputs["position_ids"], inputs["input_ids"]
    config = model.config
    kinds_BS = torch.zeros_like(ids_BS, dtype=torch.int32)
    for number, kind in enumerate(KINDS, 1):
        token = getattr(config, f"{kind}_token_id", None)
        kinds_BS += 0 if token is None else number * (ids_BS == token).int()
    positions = text_BS.expand(1 + position_axes(config), *text_BS.shape).clone()
    if not kinds_BS.any():
        return positions
    if family.audio is not None:
        ids_BS = _without_sounds(config, ids_BS)
    takes = inspect.signature(model.get_rope_index).parameters
    queues = [_Grids(kind, inputs.get(f"{kind}_grid_thw"), partial(_rows, family, config, kind)) for kind in KINDS]
    seconds = inputs.get("second_per_grid_ts")
    seconds_name = "second_per_grids" if "second_per_grids" in takes else "second_per_grid_ts"
    for b, start, stop in ((b, *bounds) for b, row in enumerate(text_BS) for bounds in sample_bounds(row)):
        kinds_S = kinds_BS[b, start:stop]
        given = {queue.name: queue.take(int((kinds_S == kind).sum())) for kind, queue in enumerate(queues, 1)}
        if seconds is not None:
            videos = given["video_grid_thw"]
            taken = 0 if videos is None else len(videos)
            given[seconds_name], seconds = seconds[:taken], seconds[taken:]
        elif "second_per_grids" in takes and given["video_grid_thw"] is not None:
            raise ValueError("this model needs inputs['second_per_grid_ts'], the seconds per time step of each video")
        if "second_per_grids" in takes:
            given["attention_mask"] = torch.ones_like(ids_BS[b : b + 1, start:stop])
        if "mm_token_type_ids" in takes:
            given["mm_token_type_ids"] = kinds_S[None]
        given = {name: value for name, value in given.items() if value is not None}
        if not given.keys() & set(GRIDS):
            continue  # text alone has the same position in all rows
        found, _ = model.get_rope_index(input_ids=ids_BS[b : b + 1, start:stop], **given)
        positions = positions.to(torch.promote_types(positions.dtype, found.dtype))  # Qwen3-Omni's are fractions
        positions[1:, b, start:stop] = found[:, 0]
    for queue in queues:
        queue.check_empty()
    return positions


def text_positions(positions: Tensor) -> Tensor:
    """The text positions (B, S) in positions of shape (B, S), or (4, B, S), where text positions come first.

    Raises:
        ValueError: the positions have another shape.
    """
    if positions.ndim == 2:
        return positions
    if positions.ndim == 3 and len(positions) >= 4:
        return positions[0]
    raise ValueError(
        f"inputs['position_ids'] has shape {tuple(positions.shape)}: give (B, S), starting anew at each sample of "
        "a row, or (4, B, S): these, then temporal, height and width positions"
    )


def _without_sounds(config: Any, ids_BS: Tensor) -> Tensor:
    """Token ids with others in place of sounds, whose tokens have the positions of text.

    Raises:
        ValueError: a sound begins inside of a video.
    """
    starts_BS = ids_BS == config.audio_start_token_id
    if ((ids_BS[:, :-1] == config.vision_start_token_id) & starts_BS[:, 1:]).any():
        raise ValueError(
            "a video has the tokens of its sound between those of its frames (use_audio_in_video), of which the "
            "positions are not known here: give the sound as an item of its own"
        )
    return ids_BS.masked_fill(starts_BS | (ids_BS == config.audio_token_id), 0)


def _rows(family: Family, config: Any, kind: str, grid: Sequence[int]) -> int:
    if family.rows is not None:
        return family.rows(config, kind, grid)
    return math.prod(grid) // config.vision_config.spatial_merge_size**2


class _Grids:
    """The grids of the images, or of the videos, which are taken sample by sample."""

    def __init__(self, kind: str, grids: Tensor | None, rows: Callable[[Sequence[int]], int]) -> None:
        self.name, self.rows = f"{kind}_grid_thw", rows
        self.left = [] if grids is None else list(grids)

    def take(self, tokens: int) -> Tensor | None:
        """The next grids, which together have this number of tokens."""
        taken: list[Tensor] = []
        while tokens > 0 and self.left:
            taken.append(self.left.pop(0))
            tokens -= self.rows(taken[-1].tolist())
        if tokens != 0:
            raise ValueError(
                f"a sample's image or video tokens do not fit the grids in inputs[{self.name!r}]: the DataModule must "
                "give each item's (t, h, w) in patches there, in the order of their tokens, without gaps"
            )
        return torch.stack(taken) if taken else None

    def check_empty(self) -> None:
        if self.left:
            raise ValueError(f"inputs[{self.name!r}] has {len(self.left)} items more than there are tokens for")


def vision_arguments(config: Any, family: Family, ids: Tensor) -> dict[str, Any]:
    """Which tokens the layers of Ernie 4.5 VL treat as vision: those of media, and those around them."""
    if not family.vision_tokens:
        return {}
    kinds = torch.stack([ids == getattr(config, name) for name in family.vision_tokens])
    return {"moe_mm_token_type_ids": kinds.any(0).int()}
