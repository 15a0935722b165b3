"""What every decoder's inputs need: positions, the samples of packed rows, and their starts where attention takes no
mask.

Shape suffixes: B samples, S tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import find_packed_sequence_indices

from . import attention
from .multimodal_inputs import text_positions

SAMPLES = "packed_sample_ids"
"""The input with the number of each token's sample in its row, (B, S); (B, 0) if every row has one sample."""


def completed_inputs(inputs: dict[str, Tensor], takes_masks: bool, refuses_packing: str) -> dict[str, Tensor]:
    """The inputs with `position_ids`, and with the starts of samples if attention needs these.

    Args:
        inputs: ``input_ids`` (B, S), and whatever else the DataModule gives.
        takes_masks: whether the attention implementation takes a mask.
        refuses_packing: why a row must not hold several samples; "": it may.

    Raises:
        ValueError: shapes do not fit, or packed samples cannot be kept apart.
    """
    inputs, ids_BS = dict(inputs), inputs["input_ids"]
    if "position_ids" not in inputs:
        inputs["position_ids"] = torch.arange(ids_BS.shape[1], device=ids_BS.device).repeat(len(ids_BS), 1)
    text_BS = text_positions(inputs["position_ids"])
    if "attention_mask" not in inputs and SAMPLES not in inputs:
        sample_BS = find_packed_sequence_indices(text_BS)
        inputs[SAMPLES] = text_BS[:, :0] if sample_BS is None else sample_BS
    known = inputs.keys() & {"attention_mask", attention.STARTS}
    if not takes_masks and not refuses_packing and not known:
        inputs[attention.STARTS] = attention.sample_starts(text_BS)
    mask_BS = inputs.get("attention_mask")
    if mask_BS is not None and mask_BS.shape != ids_BS.shape:
        raise ValueError(
            f"inputs['attention_mask'] has shape {tuple(mask_BS.shape)}, but input_ids {tuple(ids_BS.shape)}"
        )
    if (mask_BS is not None or refuses_packing) and attention.is_packed(text_BS, mask_BS):
        reason = refuses_packing or "with an attention_mask, transformers takes a packed row for one sample"
        raise ValueError(f"{reason}: give each sample a row of its own (MultimodalDataModule: packing.packed=False)")
    return inputs


@contextmanager
def known_samples(inputs: dict[str, Tensor]) -> Iterator[None]:
    """Within this context, the library's masks are made of the samples that `completed_inputs` has found.

    The library would find them out again in every forward, by a comparison that waits for the device. Here the shape
    of the input says whether rows are packed.
    """
    sample_BS = inputs.get(SAMPLES)
    if sample_BS is None:
        yield
        return
    original = masking_utils.find_packed_sequence_indices
    found = sample_BS if sample_BS.shape[1] else None
    masking_utils.find_packed_sequence_indices = lambda position_ids: found
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
