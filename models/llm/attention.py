"""Attention implementations of the transformers library: which are to be had, and how they keep packed samples apart.

"eager", "sdpa" and "flex_attention" get a mask, which the library makes of positions that start anew. All others (flash
attention of any version or kernel, or one that the user has registered) get no mask: they are told where samples start.
Knows the library's names of implementations and their arguments; knows nothing of models, stages or ranks.

Shape suffixes: B samples, S tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

MASKED = ("eager", "sdpa", "flex_attention")
STARTS = "cu_seq_lens"  # in a microbatch's inputs
TOKENS = "token_mask"
"""In a microbatch's inputs, (B, S): 0 for padding on the right. Causal attention needs no mask for that, but what
counts tokens does."""
_TO_INSTALL = {
    "flash_attention_2": "pip install flash-attn --no-build-isolation",
    "flash_attention_3": "install flash_attn_interface from the folder hopper/ of github.com/Dao-AILab/flash-attention",
    "flash_attention_4": "pip install flash-attn-4",
}


class AttentionNotThereError(ValueError):
    """An attention implementation cannot be had; says what to do."""


@contextmanager
def refused_clearly(implementation: str, model_type: str) -> Iterator[None]:
    """Around the making of a model.

    Raises:
        AttentionNotThereError: the implementation cannot be had.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        text = str(error)
        if isinstance(error, ValueError) and "attention" not in text.lower() and "attn" not in text:
            raise
        remedy = "use " + " or ".join(name for name in ("sdpa", "eager") if name != implementation)
        if implementation in _TO_INSTALL and "installed" in text:
            remedy = f"{_TO_INSTALL[implementation]}, or {remedy}"
        raise AttentionNotThereError(
            f"attn_implementation={implementation!r} cannot be used for model_type {model_type!r}: {remedy} ({text})"
        ) from error


def check_device(implementation: str, device: torch.device) -> None:
    """
    Raises:
        ValueError: this implementation does not train on this device.
    """
    if device.type == "cpu" and (implementation == "flex_attention" or implementation.startswith("flash_attention")):
        raise ValueError(f"attn_implementation={implementation!r} needs a GPU: use sdpa or eager on the CPU")


def is_packed(positions_BS: Tensor, mask_BS: Tensor | None = None) -> bool:
    """Whether any row holds several samples: its positions do not go on one by one, as for the library's masks.

    Args:
        mask_BS: 0 where there is padding, whose positions do not count.
    """
    breaks_BS = positions_BS.diff(dim=-1) != 1
    if mask_BS is not None:
        breaks_BS = breaks_BS & (mask_BS[:, 1:] > 0) & (mask_BS[:, :-1] > 0)
    return bool(breaks_BS.any())


def sample_starts(positions_BS: Tensor) -> Tensor:
    """Where samples start in all rows one after another, and the end of the last one, int32."""
    first_BS = torch.ones_like(positions_BS, dtype=torch.bool)
    first_BS[:, 1:] = positions_BS.diff(dim=-1) != 1
    starts = first_BS.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([positions_BS.numel()])]).int()


def sample_bounds(positions_S: Tensor) -> list[tuple[int, int]]:
    """First token, and token after the last, of each sample of a row."""
    return list(pairwise(sample_starts(positions_S[None]).tolist()))


def sample_arguments(starts: Tensor, longest: int) -> dict[str, Any]:
    """What the layers pass on to an implementation without masks.

    Args:
        starts: as of `sample_starts`.
        longest: of the samples; it may be given too long, which spares the device from being asked.
    """
    given = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
    return {**given, "max_length_q": longest, "max_length_k": longest}


def packed_masks(config: Any, h_BSD: Tensor, positions_BS: Tensor) -> Any:
    """What a decoder takes as its attention mask, a mask or one by layer type, made by the library of positions that
    start anew; for decoders that make their own without looking at positions."""
    return create_masks_for_generate(
        config=config, inputs_embeds=h_BSD, attention_mask=None, cache=None, position_ids=positions_BS
    )
