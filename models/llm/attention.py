"""The attention implementations of the transformers library, and how each keeps the samples of a packed row apart.

"eager", "sdpa" and "flex_attention" get a mask, which the library makes of positions that start anew. All others (flash
attention of any version or kernel, or a function that the user has registered) get no mask, but the places where
samples start.

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
"""The implementations that get a mask."""
STARTS = "cu_seq_lens"
"""The input of a microbatch with the starts of samples; see `sample_starts`."""
TOKENS = "token_mask"
"""The input of a microbatch, (B, S), that is 0 for padding on the right. Causal attention needs no mask for such
padding, but losses that count tokens do."""
_TO_INSTALL = {
    "flash_attention_2": "pip install flash-attn --no-build-isolation",
    "flash_attention_3": "install flash_attn_interface from the folder hopper/ of github.com/Dao-AILab/flash-attention",
    "flash_attention_4": "pip install flash-attn-4",
}


class AttentionNotThereError(ValueError):
    """An attention implementation is not installed or does not exist. The message says what to do."""


@contextmanager
def refused_clearly(implementation: str, model_type: str) -> Iterator[None]:
    """Turns errors about attention, which come while the block builds a model, into clear ones.

    Raises:
        AttentionNotThereError: the implementation is not installed or does not exist.
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
        ValueError: the implementation does not train on this device.
    """
    if device.type == "cpu" and (implementation == "flex_attention" or implementation.startswith("flash_attention")):
        raise ValueError(f"attn_implementation={implementation!r} needs a GPU: use sdpa or eager on the CPU")


def is_packed(positions_BS: Tensor, mask_BS: Tensor | None = None) -> bool:
    """Whether any row holds several samples. As in the library's masks, a sample starts where a position is not the one
    before plus 1.

    Args:
        mask_BS: 0 for padding, whose positions do not count.
    """
    breaks_BS = positions_BS.diff(dim=-1) != 1
    if mask_BS is not None:
        breaks_BS = breaks_BS & (mask_BS[:, 1:] > 0) & (mask_BS[:, :-1] > 0)
    return bool(breaks_BS.any())


def sample_starts(positions_BS: Tensor) -> Tensor:
    """The starts of all samples, with rows one after another, and the end of the last sample: (samples + 1,), int32."""
    first_BS = torch.ones_like(positions_BS, dtype=torch.bool)
    first_BS[:, 1:] = positions_BS.diff(dim=-1) != 1
    starts = first_BS.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([positions_BS.numel()])]).int()


def sample_bounds(positions_S: Tensor) -> list[tuple[int, int]]:
    """The first token of each sample of a row, and the token after its last one."""
    return list(pairwise(sample_starts(positions_S[None]).tolist()))


def sample_arguments(starts: Tensor, longest: int) -> dict[str, Any]:
    """The arguments of the decoder that its layers pass on to an implementation without masks.

    Args:
        starts: the result of `sample_starts`.
        longest: the length of the longest sample. A larger number does no harm, and the length of the row is known
            without waiting for the device.
    """
    given = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
    return {**given, "max_length_q": longest, "max_length_k": longest}


def packed_masks(config: Any, h_BSD: Tensor, positions_BS: Tensor) -> Any:
    """The attention mask, or one for each layer type, for decoders that make their own without looking at positions.
    The library makes it of positions that start anew."""
    return create_masks_for_generate(
        config=config, inputs_embeds=h_BSD, attention_mask=None, cache=None, position_ids=positions_BS
    )
