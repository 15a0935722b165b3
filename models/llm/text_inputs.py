"""What every decoder's inputs need: positions, and the starts of samples where attention takes no mask.

Shape suffixes: B samples, S tokens.
"""

import torch
from torch import Tensor

from . import attention
from .multimodal_inputs import text_positions


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
