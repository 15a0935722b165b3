"""Finds out whether a stage of a decoder of the library gives the same hidden states with a cache of keys and values as
without.

A few tokens run through its layers, all at once and one after the other. Not every model of the library can keep them:
some want a cache of their own, and some have got it wrong.
"""

from typing import Any

import torch
from torch import Tensor

from bigmac_lightning.contracts.components import LanguageModel

TOKENS, FIRST = 7, 4
TOLERANCE = 0.05
"""Of the norm of the hidden states; for weights of 16 bits."""


@torch.no_grad()
def agrees(llm: LanguageModel, cache: Any, layers: range, device: torch.device) -> bool:
    """
    Args:
        llm: a decoder with the weights of these layers, and with the embedding if the first layer is one of them.
        cache: an empty cache of the stage.
        layers: those of the stage.
    """
    usable = [token for token in range(llm.vocabulary) if token not in llm.placeholders.values()][:TOKENS]
    ids_1S = torch.tensor([(usable * TOKENS)[:TOKENS]], device=device)
    h_1SD = torch.randn(1, TOKENS, llm.width, generator=torch.Generator().manual_seed(0))
    h_1SD = h_1SD.to(device, next(llm.parameters()).dtype)
    extras = _extras(llm, layers.start, h_1SD)

    def hidden(start: int, stop: int) -> Tensor:
        own = {name: extra.narrow(dim, start, stop - start) for name, (extra, dim) in extras.items()}
        return _hidden(llm, layers, ids_1S[:, start:stop], h_1SD[:, start:stop], own, start)

    expected, found = hidden(0, TOKENS), list[Tensor]()
    try:
        with llm.using_cache(cache):
            for start, stop in ((0, FIRST), *((k, k + 1) for k in range(FIRST, TOKENS))):
                found.append(hidden(start, stop))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError):  # it wants another cache, or none
        return False
    error = (torch.cat(found, dim=1) - expected).norm() / expected.norm()
    return bool(error < TOLERANCE)


def _extras(llm: LanguageModel, layer: int, h_1SD: Tensor) -> dict[str, tuple[Tensor, int]]:
    """By name, what goes into a layer with the hidden states for each token, and its dimension of tokens."""
    if layer == 0:
        return {}
    shapes, of_one = (llm.extra_shapes(layer, (1, tokens), 0, 1) for tokens in (TOKENS, 1))
    differs = {name: [a != b for a, b in zip(shape, of_one[name], strict=True)] for name, shape in shapes.items()}
    random = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(shapes[name], generator=random).to(h_1SD), where.index(True))
        for name, where in differs.items()
        if any(where)
    }


def _hidden(
    llm: LanguageModel, layers: range, ids_1S: Tensor, h_1SD: Tensor, extras: dict[str, Tensor], start: int
) -> Tensor:
    """The hidden states after these layers; before them, embeddings if they are the first layers."""
    positions = torch.arange(start, start + ids_1S.shape[1], device=ids_1S.device)[None]
    inputs = llm.prepare({"input_ids": ids_1S, "position_ids": positions})
    before = llm.embed(inputs) if layers.start == 0 else h_1SD
    return llm.run_layers(before, inputs, layers, extras).float()
