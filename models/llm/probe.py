"""Looks at what a decoder does around its layers, to tell whether it can be cut between them and hold packed rows.

The library's own forward runs on a few tokens, with stand-ins for the layers that note what they are called with and
return what they were told to. No layer's weights are needed: it takes as long for a real model as for a tiny one, gives
the same answer on every rank, and is asked when a model is built, before anything is read or trained.

A stage passes on hidden states alone. So between its layers a decoder may do nothing else (`why_not_cut`): not run a
layer twice, nor change hidden states between two of them, nor give a layer what an earlier one has made, or what
depends on the embeddings or the token ids. And in a packed row a layer must get for each sample what it gets for the
sample alone (`why_not_packed`): positions, and a mask by which its tokens see no other sample's; or its attention must
be told where samples start (`why_not_told`).

Knows decoders with `layers`, an embedding and a norm; knows nothing of stages, families or ranks. What happens inside
a layer is not looked at, but for which modules it has and what its attention is told.

Shape suffixes: B samples, S tokens, D width.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..surgery import Names
from .attention import packed_masks, sample_arguments
from .rope import changes_with_length
from .twin import SHORT, STATE, Run, Twin

LENGTHS = (11, 12)  # tokens of two samples
MASKED = ("eager", "sdpa")  # attention implementations whose masks can be looked at here
MIXERS = (nn.Conv1d,)  # modules by which tokens see each other, whatever a mask says
TYPES = ("full_attention", "sliding_attention", "chunked_attention", "indexed_attention")
"""Types of layers in which tokens see each other as a mask says, wherever in a row they stand."""
MasksOf = Callable[[Any, Tensor, Tensor], Any]
"""From config, embeddings and positions to what the decoder takes as its attention mask."""


def why_not_cut(decoder: Any, names: Names, width: int) -> str:
    """Why a decoder cannot be cut between its layers; empty: it can.

    Args:
        decoder: whole, on the meta device.
        names: of its parts.
        width: D.
    """
    return (
        _about_weights(decoder, names)
        or _looked_at(_about_layers, decoder, names, width)
        or _looked_at(_about_results, decoder, names, width, decoder)
    )


def packing(decoder: Any, names: Names, width: int, position_rows: int, takes_masks: bool) -> tuple[str, bool]:
    """Why a row must not hold several samples, and whether it may because the decoder is given masks for them.

    Args:
        decoder, names, width, position_rows: as of `why_not_packed`.
        takes_masks: whether its attention implementation does.
    """
    given = False
    if reason := why_not_packed(decoder, names, width, position_rows):
        given = not why_not_packed(decoder, names, width, position_rows, packed_masks)
    if reason and not given:
        return reason, False
    return ("", given) if takes_masks else (why_not_told(decoder, names, width, position_rows), False)


def why_not_packed(decoder: Any, names: Names, width: int, position_rows: int = 1, masks: MasksOf | None = None) -> str:
    """Why a row must not hold several samples; empty: it may, with positions that start anew at each.

    Args:
        decoder: whole, on the meta device; one that can be cut.
        names: of its parts.
        width: D.
        position_rows: 1, or 4 where positions are text, temporal, height and width.
        masks: makes the attention mask; ``None``: the decoder does.
    """
    for k, layer in enumerate(decoder.layers):
        if mixer := next((type(m).__name__ for m in layer.modules() if isinstance(m, MIXERS)), ""):
            return f"layer {k} has a {mixer}, which cannot keep packed samples apart"
    for k, kind in enumerate(getattr(decoder.config, "layer_types", None) or ()):
        if kind not in TYPES:
            return f"layer {k} is of the type {kind}, of which it is not known whether it keeps packed samples apart"
    for attention in MASKED:
        if reason := _looked_at(_about_packing, decoder, names, width, attention, position_rows, masks):
            return reason
    return ""


def why_not_told(decoder: Any, names: Names, width: int, position_rows: int = 1) -> str:
    """Why a row must not hold several samples where attention takes no mask, but is told where samples start.

    Args:
        decoder, names, width, position_rows: as of `why_not_packed`.
    """
    return _looked_at(_about_telling, decoder, names, width, position_rows, decoder)


def _looked_at(look: Callable[..., str], decoder: Any, names: Names, *arguments: Any) -> str:
    with torch.no_grad(), torch.device("cpu"):
        try:
            return look(Twin(decoder, names), *arguments)
        except Exception as problem:  # whatever it does with what a layer is not expected to return
            return f"its layers hand on or need more than hidden states ({type(problem).__name__}: {problem})"


def _about_weights(decoder: Any, names: Names) -> str:
    around = (names.embedding, names.norm)
    owners = {id(p): part for part in around for p in decoder.get_submodule(part).parameters()}
    for k, layer in enumerate(decoder.layers):
        for name, parameter in layer.named_parameters():
            if owners.setdefault(id(parameter), f"layer {k}") != f"layer {k}":
                return f"layer {k} shares the weight {name} with {owners[id(parameter)]}, which may be on another rank"
    if others := [name for name, parameter in decoder.named_parameters() if id(parameter) not in owners]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f"its decoder has weights beside embedding, layers and final norm ({others[0]}{more})"
    for k, layer in enumerate(decoder.layers):
        if any(map(changes_with_length, layer.modules())):
            return f"layer {k} has a rotary embedding of its own, which may remember how long rows were before"
    if getattr(decoder, "layerdrop", 0):
        return "it leaves out layers at random (layerdrop), for each stage others: set it to 0 in the config"
    return ""


def _about_layers(twin: Twin, width: int) -> str:
    last = len(twin.shell.layers) - 1
    positions = torch.arange(LENGTHS[0])[None]
    one, other = torch.randn(2, 1, LENGTHS[0], width, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    twin.config._attn_implementation = "eager"
    run = twin.run(one, positions, results=[2.0 + k for k in range(last)] + [1.5])
    if [k for k in run.order if k != "norm"] != list(range(last + 1)):
        return f"it runs its {last + 1} layers in another order than one after another"
    if "norm" in run.order and run.order.index("norm") < last:
        return "its final norm is used before the last layer, too"
    first = run.hidden[0]
    if not isinstance(first, Tensor) or (first.shape, first.dtype) != (one.shape, one.dtype):
        return "what goes from layer to layer has another shape or type than the embeddings"
    for k in range(last):
        if not _same(run.hidden[k + 1], one.new_tensor(2.0 + k).expand(one.shape)):
            return f"it changes what goes from layer {k} to layer {k + 1}"
    again = twin.run(other, positions, results=[3.0 + k for k in range(last)] + [1.5])
    by_ids = twin.run(one, positions, results=[2.0 + k for k in range(last)] + [1.5], by_ids=True)
    for k, others in enumerate(run.others):
        for name, value in others.items():
            if value is STATE:
                return f"layer {k} gets {name}, by which layers can hand on more than hidden states"
            if not _same(value, again.others[k].get(name)):
                return f"layer {k} gets {name}, which depends on hidden states or embeddings"
            if not _same(value, by_ids.others[k].get(name)):
                return f"layer {k} gets {name}, which depends on the token ids"
    if not _same(by_ids.hidden[0], first):
        return "what goes into its first layer depends on more of the token ids than their embeddings"
    if not _same(run.out, again.out):
        return "what it makes at its end depends on more than what comes out of its last layer"
    twin.shorten()
    before, _, after = (
        twin.run(one[:, :length], torch.arange(length)[None]) for length in (SHORT + 1, LENGTHS[0], SHORT + 1)
    )
    for k, others in enumerate(before.others):
        for name, value in others.items():
            if not _same(value, after.others[k].get(name)):
                return f"layer {k} gets {name}, which depends on how long rows were that came before"
    return ""


def _about_results(twin: Twin, width: int, decoder: Any) -> str:
    """Runs one real layer of each kind on the meta device, in bfloat16."""
    twin.config._attn_implementation = "eager"
    h_BSD = torch.zeros(1, LENGTHS[0], width, dtype=torch.bfloat16)
    twin.run(h_BSD, torch.arange(LENGTHS[0])[None])
    kinds = {tuple(map(type, layer.modules())): k for k, layer in enumerate(decoder.layers)}
    with _attention(decoder, "eager"):
        for k in kinds.values():
            with suppress(Exception):  # experts may need what is not there without values
                args, kwargs = twin.given_on_meta(k)
                result = copy.deepcopy(decoder.layers[k]).to(torch.bfloat16)(*args, **kwargs)
                if not isinstance(result, Tensor) or result.shape != h_BSD.shape:
                    return f"layer {k} returns more than hidden states"
                if result.dtype != h_BSD.dtype:
                    return (
                        f"layer {k} returns {result.dtype} where weights are {h_BSD.dtype}, which would be rounded "
                        "between stages; if the config has residual_in_fp32, set it to false"
                    )
    return ""


@contextmanager
def _attention(decoder: Any, name: str) -> Iterator[None]:
    """With another attention implementation."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def _about_packing(twin: Twin, width: int, attention: str, position_rows: int, masks: MasksOf | None) -> str:
    twin.config._attn_implementation = attention
    twin.shorten()

    def run(*lengths: int) -> Run:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        h_BSD = torch.zeros(1, sum(lengths), width)
        mask = None if masks is None else masks(twin.config, h_BSD, positions)
        return twin.run(h_BSD, positions if position_rows == 1 else positions.expand(position_rows, 1, -1), mask=mask)

    packed, alone = run(*LENGTHS), [run(length) for length in LENGTHS]
    for k, others in enumerate(packed.others):
        if reason := _why_mixed(others, [single.others[k] for single in alone]):
            return f"layer {k} {reason}"
    return ""


def _why_mixed(packed: dict[str, Any], alone: list[dict[str, Any]]) -> str:
    """How a layer's arguments for a packed row differ from those for its samples alone."""
    masks, S = 0, sum(LENGTHS)
    bounds = list(pairwise(accumulate(LENGTHS, initial=0)))
    for name, value in packed.items():
        singles = [single.get(name) for single in alone]
        if not isinstance(value, Tensor):
            if any(isinstance(single, Tensor) for single in singles):
                return f"gets {name} for samples alone, but not for a packed row"
        elif value.shape[-2:] == (S, S):
            masks += 1
            seen = value.clone() if value.dtype == torch.bool else value > torch.finfo(value.dtype).min / 2
            for (start, stop), single in zip(bounds, singles, strict=True):
                length = stop - start
                expected = torch.ones(length, length, dtype=torch.bool).tril() if single is None else single
                block = (seen if expected.dtype == torch.bool else value)[..., start:stop, start:stop]
                if not torch.equal(block, expected.expand(block.shape)):
                    return f"gets another {name} in a packed row than for a sample alone"
                seen[..., start:stop, start:stop] = False
            if seen.any():
                return f"gets {name}, by which samples in a packed row see one another"
        else:
            for (start, stop), single in zip(bounds, singles, strict=True):
                if not isinstance(single, Tensor) or single.ndim != value.ndim:
                    return f"gets {name} for a packed row, but not for samples alone"
                part = value
                for dim, (whole, size) in enumerate(zip(value.shape, single.shape, strict=True)):
                    part = part if whole == size else part.narrow(dim, start, stop - start)
                if not _same(part, single):
                    return f"gets another {name} in a packed row than for a sample alone"
    return "" if masks else "gets no attention mask that could keep packed samples apart"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def _about_telling(twin: Twin, width: int, position_rows: int, decoder: Any) -> str:
    """Runs the real layers on the meta device, with what they get from the decoder."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].expand(position_rows, 1, -1)
    h_BSD = torch.zeros(1, sum(LENGTHS), width)
    told: list[bool] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        told.append(kwargs.get("cu_seq_lens_q") is not None)
        return query.new_empty(*query.transpose(1, 2).shape[:-1], value.shape[-1]), None

    name = "looked_at"
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        with _attention(decoder, name):
            twin.config._attn_implementation = name
            starts = sample_arguments(torch.tensor([0, *accumulate(LENGTHS)]).int(), max(LENGTHS))
            twin.run(h_BSD, positions[0] if position_rows == 1 else positions, **starts)
            for k, layer in enumerate(decoder.layers):
                told.clear()
                with suppress(Exception):  # as above, after attention
                    args, kwargs = twin.given_on_meta(k)
                    layer(*args, **kwargs)
                if not told or not all(told):
                    return f"the attention of layer {k} is not told where samples start"
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
    return ""
