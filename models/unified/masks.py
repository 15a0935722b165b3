"""Which tokens see each other in rows with pictures that are being drawn.

Shape suffixes: B samples or rows of them, S tokens, D width of the LLM.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from ..llm.text_inputs import SAMPLES

PICTURES = "drawn_pictures"
"""The input with the number of each token's picture in its row, (B, S); -1 for all tokens but those of drawn ones."""

ALONE = "drawn_without_condition"
"""The input, (B, S), that is true for tokens of drawn pictures that see themselves alone; optional."""


def pictures_of(drawn_BS: Tensor, positions_BS: Tensor) -> Tensor:
    """The input `PICTURES`. A picture ends where another token comes, or another sample.

    Args:
        drawn_BS: whether each token is one of a drawn picture.
        positions_BS: of tokens in their samples.
    """
    first_BS, before_BS = torch.ones_like(drawn_BS), drawn_BS[:, :-1]
    first_BS[:, 1:] = ~before_BS | (positions_BS.diff(dim=-1) != 1)
    return torch.where(drawn_BS, (drawn_BS & first_BS).cumsum(1) - 1, -1)


def mask_of(config: PreTrainedConfig, h_BSD: Tensor, inputs: dict[str, Tensor]) -> Any:
    """The mask in the form that the attention implementation takes: tokens of a picture see each other, and no token
    outside of it sees them; all others are seen by those after them in their sample."""
    pictures_BS, sample_BS, alone_BS = inputs[PICTURES], inputs.get(SAMPLES), inputs.get(ALONE)

    def is_seen(b: Any, head: Any, query: Any, key: Any) -> Any:
        seen = pictures_BS[b, key] < 0
        if sample_BS is not None and sample_BS.shape[1]:
            seen = seen & (sample_BS[b, query] == sample_BS[b, key])
        return seen if alone_BS is None else seen & ~alone_BS[b, query]

    # without positions, by which the library would give `is_seen` the places of tokens in their samples
    given = (config, h_BSD, inputs.get("attention_mask"), None, None)
    return create_causal_mask(*given, block_sequence_ids=pictures_BS, and_mask_function=is_seen)
