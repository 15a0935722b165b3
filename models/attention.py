"""Attention implementations of the transformers library: which are to be had, and how they keep packed samples apart.

"eager", "sdpa" and "flex_attention" get a mask, which the library makes of positions that start anew. All others (flash
attention of any version or kernel, or one that the user has registered) get no mask: they are told where samples start.
Knows the library's names of implementations and their arguments; knows nothing of models, stages or ranks.

Shape suffixes: B samples, S tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MASKED = ("eager", "sdpa", "flex_attention")
STARTS = "cu_seq_lens"  # in a microbatch's inputs
_TO_INSTALL = {
    "flash_attention_2": "pip install flash-attn --no-build-isolation",
    "flash_attention_3": "install flash_attn_interface from the folder hopper/ of github.com/Dao-AILab/flash-attention",
    "flash_attention_4": "pip install flash-attn-4",
}


@contextmanager
def refused_clearly(implementation: str, model_type: str) -> Iterator[None]:
    """Around the making of a model: a `ValueError` that says what to do where an implementation cannot be had."""
    try:
        yield
    except (ImportError, ValueError) as error:
        text = str(error)
        if isinstance(error, ValueError) and "attention" not in text.lower() and "attn" not in text:
            raise
        remedy = "use " + " or ".join(name for name in ("sdpa", "eager") if name != implementation)
        if implementation in _TO_INSTALL and "installed" in text:
            remedy = f"{_TO_INSTALL[implementation]}, or {remedy}"
        raise ValueError(
            f"attn_implementation={implementation!r} cannot be used for model_type {model_type!r}: {remedy} ({text})"
        ) from error


def check_device(implementation: str, device: torch.device) -> None:
    """
    Raises:
        ValueError: this implementation does not train on this device.
    """
    if device.type == "cpu" and (implementation == "flex_attention" or implementation.startswith("flash_attention")):
        raise ValueError(f"attn_implementation={implementation!r} needs a GPU: use sdpa or eager on the CPU")


def sample_starts(positions_BS: Tensor) -> Tensor:
    """Where samples start in all rows one after another, and the end of the last one, int32: positions start anew with
    each row and each packed sample."""
    first_BS = torch.ones_like(positions_BS, dtype=torch.bool)
    first_BS[:, 1:] = positions_BS.diff(dim=-1) < 0
    starts = first_BS.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([positions_BS.numel()])]).int()


def sample_arguments(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the layers pass on to an implementation without masks; the longest sample may be given too long, which
    spares the device from being asked."""
    if STARTS not in inputs:
        return {}
    longest = inputs["input_ids"].shape[-1]
    given = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), inputs[STARTS])
    return {**given, "max_length_q": longest, "max_length_k": longest}
