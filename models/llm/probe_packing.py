"""Finds out whether a row may hold several samples, by running a decoder's forward with stubs for its layers.

In a packed row a layer must get for each sample what it gets for that sample alone: positions, and a mask by which the
sample's tokens see no other sample (`why_not_packed`). An attention implementation that takes no mask must be given the
places where samples start instead (`why_not_by_starts`).

Shape suffixes: B samples, S tokens, D width.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..meta_model import Names
from .attention import packed_masks, sample_arguments
from .probe_cut import TOKENS, attention_set_to, probed, same
from .stub_decoder import StubDecoder, StubRun

LENGTHS = (TOKENS, TOKENS + 1)
"""Tokens of two samples. They differ, so that what belongs to one cannot be taken for what belongs to the other."""
READABLE = ("eager", "sdpa")
"""Attention implementations whose masks are tensors that can be compared here."""
MIXERS = (nn.Conv1d,)
"""Modules by which tokens see each other whatever a mask says."""
TYPES = (
    "full_attention",
    "sliding_attention",
    "reference_sliding_attention",
    "chunked_attention",
    "indexed_attention",
)
"""The types of layers in which tokens see each other as a mask says, wherever in a row they are."""
MasksOf = Callable[[Any, Tensor, Tensor], Any]
"""Makes of config, embeddings and positions what the decoder takes as its attention mask."""


def packing(decoder: Any, names: Names, width: int, position_rows: int, takes_masks: bool) -> tuple[str, bool]:
    """Why a row must not hold several samples ("": it may), and whether the decoder has to be given masks for that.

    Args:
        decoder, names, width, position_rows: see `why_not_packed`.
        takes_masks: whether the decoder's attention implementation takes a mask.
    """
    needs_masks = False
    if reason := why_not_packed(decoder, names, width, position_rows):
        needs_masks = not why_not_packed(decoder, names, width, position_rows, packed_masks)
    if reason and not needs_masks:
        return reason, False
    return ("", needs_masks) if takes_masks else (why_not_by_starts(decoder, names, width, position_rows), False)


def why_not_packed(decoder: Any, names: Names, width: int, position_rows: int = 1, masks: MasksOf | None = None) -> str:
    """Why a row must not hold several samples; "": it may, with positions that start anew at each sample.

    Args:
        decoder: the whole decoder, on the meta device; it must be one that can be cut.
        names: the names of its parts.
        width: D.
        position_rows: 1; or 4 where positions are text, temporal, height and width (M-RoPE).
        masks: makes the attention mask; ``None``: the decoder does.
    """
    for k, layer in enumerate(decoder.layers):
        if mixer := next((type(m).__name__ for m in layer.modules() if isinstance(m, MIXERS)), ""):
            return f"layer {k} has a {mixer}, which cannot keep packed samples apart"
    if reason := counts_tokens(decoder):
        return reason
    for k, kind in enumerate(getattr(decoder.config, "layer_types", None) or ()):
        if kind not in TYPES:
            return f"layer {k} is of the type {kind}, of which it is not known whether it keeps packed samples apart"
    for attention in READABLE:
        if reason := probed(_masks_problem, decoder, names, width, attention, position_rows, masks):
            return reason
    return ""


def counts_tokens(decoder: Any) -> str:
    """Which layer uses the places of tokens in what it gets, and not the positions that it is given; "": none does.

    Llama 4 scales the queries of layers without rotary positions so.
    """
    for k, layer in enumerate(decoder.layers):
        for part in layer.modules():
            if getattr(part, "attn_temperature_tuning", False) and not getattr(part, "use_rope", True):
                return f"layer {k} scales queries by the place of a token in its row (attn_temperature_tuning)"
    return ""


def why_not_by_starts(decoder: Any, names: Names, width: int, position_rows: int = 1) -> str:
    """Why a row must not hold several samples where attention takes no mask, but the places where samples start.

    Args:
        decoder, names, width, position_rows: see `why_not_packed`.
    """
    return probed(_starts_problem, decoder, names, width, position_rows, decoder)


def _masks_problem(stubs: StubDecoder, width: int, attention: str, position_rows: int, masks: MasksOf | None) -> str:
    """Compares a packed row of two samples with a row for each of them."""
    stubs.config._attn_implementation = attention
    stubs.shorten()

    def run(*lengths: int) -> StubRun:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        h_BSD = torch.zeros(1, sum(lengths), width)
        mask = None if masks is None else masks(stubs.config, h_BSD, positions)
        return stubs.run(h_BSD, positions if position_rows == 1 else positions.expand(position_rows, 1, -1), mask=mask)

    packed, alone = run(*LENGTHS), [run(length) for length in LENGTHS]
    for k, others in enumerate(packed.others):
        if reason := _why_mixed(others, [single.others[k] for single in alone]):
            return f"layer {k} {reason}"
    return ""


def _why_mixed(packed: dict[str, Any], alone: list[dict[str, Any]]) -> str:
    """How a layer's arguments for a packed row differ from those for its samples alone."""
    masks, S = 0, sum(LENGTHS)
    for name, value in packed.items():
        singles = [single.get(name) for single in alone]
        if not isinstance(value, Tensor):
            if any(isinstance(single, Tensor) for single in singles):
                return f"gets {name} for samples alone, but not for a packed row"
        elif value.shape[-2:] == (S, S):
            masks += 1
            if reason := _mask_difference(name, value, singles):
                return reason
        elif reason := _difference(name, value, singles):
            return reason
    return "" if masks else "gets no attention mask that could keep packed samples apart"


def _bounds() -> list[tuple[int, int]]:
    return list(pairwise(accumulate(LENGTHS, initial=0)))


def _mask_difference(name: str, mask: Tensor, singles: list[Any]) -> str:
    """How a mask differs from the masks of the samples alone on its diagonal, and from "not seen" elsewhere."""
    seen = mask.clone() if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    for (start, stop), single in zip(_bounds(), singles, strict=True):
        length = stop - start
        # Of one sample the library may make no mask, and leave "causal" to the implementation.
        expected = torch.ones(length, length, dtype=torch.bool).tril() if single is None else single
        block = (seen if expected.dtype == torch.bool else mask)[..., start:stop, start:stop]
        if not torch.equal(block, expected.expand(block.shape)):
            return f"gets another {name} in a packed row than for a sample alone"
        seen[..., start:stop, start:stop] = False
    return f"gets {name}, by which samples in a packed row see one another" if seen.any() else ""


def _difference(name: str, value: Tensor, singles: list[Any]) -> str:
    """How an argument with an entry for each token differs from those of the samples alone."""
    for (start, stop), single in zip(_bounds(), singles, strict=True):
        if not isinstance(single, Tensor) or single.ndim != value.ndim:
            return f"gets {name} for a packed row, but not for samples alone"
        part = value
        for dim, (whole, size) in enumerate(zip(value.shape, single.shape, strict=True)):
            part = part if whole == size else part.narrow(dim, start, stop - start)
        if not same(part, single):
            return f"gets another {name} in a packed row than for a sample alone"
    return ""


def _starts_problem(stubs: StubDecoder, width: int, position_rows: int, decoder: Any) -> str:
    """Which layer's attention does not get the starts of samples. The real layers run on the meta device, with a
    registered attention function that records whether it gets them."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].expand(position_rows, 1, -1)
    h_BSD = torch.zeros(1, sum(LENGTHS), width)
    got_starts: list[bool] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        got_starts.append(kwargs.get("cu_seq_lens_q") is not None)
        return query.new_empty(*query.transpose(1, 2).shape[:-1], value.shape[-1]), None

    name = "records_starts"
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        with attention_set_to(decoder, name):
            stubs.config._attn_implementation = name
            starts = sample_arguments(torch.tensor([0, *accumulate(LENGTHS)]).int(), max(LENGTHS))
            stubs.run(h_BSD, positions[0] if position_rows == 1 else positions, **starts)
            for k, layer in enumerate(decoder.layers):
                got_starts.clear()
                with suppress(Exception):  # behind attention, experts may need values, which the meta device lacks
                    args, kwargs = stubs.arguments_on_meta(k)
                    layer(*args, **kwargs)
                if not got_starts or not all(got_starts):
                    return f"the attention of layer {k} does not get the starts of samples"
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
    return ""
