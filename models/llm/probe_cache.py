"""Finds out whether a decoder of the library gives the same hidden states with a cache of keys and values as without.

A few tokens run through its layers, all at once and one after the other. Not every model of the library can keep them:
some want a cache of their own, and some have got it wrong.
"""

import torch
from torch import Tensor
from transformers import DynamicCache

from bigmac_lightning.contracts.components import LanguageModel

TOKENS, FIRST = 7, 4
TOLERANCE = 0.05
"""Of the norm of the hidden states; for weights of 16 bits."""


@torch.no_grad()
def agrees(llm: LanguageModel, cache: DynamicCache, device: torch.device) -> bool:
    """
    Args:
        llm: a decoder with all of its weights.
        cache: an empty cache.
    """
    usable = [token for token in range(llm.vocabulary) if token not in llm.placeholders][:TOKENS]
    ids_1S = torch.tensor([(usable * TOKENS)[:TOKENS]], device=device)
    expected = _hidden(llm, ids_1S, 0)
    found = list[Tensor]()
    try:
        with llm.using_cache(cache):
            for start, stop in ((0, FIRST), *((k, k + 1) for k in range(FIRST, TOKENS))):
                found.append(_hidden(llm, ids_1S[:, start:stop], start))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError):  # it wants another cache, or none
        return False
    error = (torch.cat(found, dim=1) - expected).norm() / expected.norm()
    return bool(error < TOLERANCE)


def _hidden(llm: LanguageModel, ids_1S: Tensor, start: int) -> Tensor:
    positions = torch.arange(start, start + ids_1S.shape[1], device=ids_1S.device)[None]
    inputs = llm.prepare({"input_ids": ids_1S, "position_ids": positions})
    return llm.run_layers(llm.embed(inputs), inputs, range(llm.num_layers), {}).float()
