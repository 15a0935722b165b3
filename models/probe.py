"""Looks at what a decoder does around its layers, to tell whether it can be cut between them and hold packed rows.

The library's own forward runs on a few tokens, with stand-ins for the layers that note what they are called with and
return what they were told to. No layer's weights are needed: it takes as long for a real model as for a tiny one, gives
the same answer on every rank, and is asked when a model is built, before anything is read or trained.

A stage passes on hidden states alone. So between its layers a decoder may do nothing else (`why_not_cut`): not run a
layer twice, nor change hidden states between two of them, nor give a layer what an earlier one has made, or what
depends on the embeddings or the token ids. And in a packed row a layer must get for each sample what it gets for the
sample alone (`why_not_packed`): positions, and a mask by which its tokens see no other sample's.

Knows decoders with `layers`, an embedding and a norm; knows nothing of stages, families or ranks. What happens inside
a layer is not looked at, but for which modules it has.

Shape suffixes: B samples, S tokens, D width.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .initialization import allocate_and_initialize
from .rope import changes_with_length, stateless_ropes
from .stage import hidden_of, shell_of
from .surgery import Names, PassThrough

LENGTHS = (11, 12)  # tokens of two samples
SHORT = 4
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
    return _about_weights(decoder, names) or _looked_at(_about_layers, decoder, names, width)


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


def _looked_at(look: Callable[..., str], decoder: Any, names: Names, *arguments: Any) -> str:
    with torch.no_grad(), torch.device("cpu"):
        try:
            return look(_Twin(decoder, names), *arguments)
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


class _StandIn(PassThrough):
    """Stands for a layer, or for the norm.

    Attributes:
        result: what it returns; ``None``: what it gets.
        calls: hidden states, and all other arguments by name.
        order: of all calls, also of others.
    """

    def __init__(self, instead_of: nn.Module, place: Any, order: list[Any]) -> None:
        super().__init__(instead_of)
        self.place, self.order = place, order
        self.result: Tensor | None = None
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(args, kwargs)
        others = {f"argument {i}": value for i, value in enumerate(args) if i}
        others |= {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.order.append(self.place)
        self.calls.append((hidden, dict(_leaves(others))))
        return hidden if self.result is None else self.result


class _Embedding(nn.Module):
    """Stands for the embedding: returns what it was told to."""

    result: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor | None:
        return self.result


_STATE = object()
"""Stands for an argument by which layers could tell one another something."""


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is inside nested containers, each with a name."""
    if isinstance(value, Cache) or (isinstance(value, Mapping | list) and not value and name):
        yield name, _STATE
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@dataclass
class _Run:
    """What a forward did.

    Attributes:
        order: layers, and the norm, as they were called.
        hidden: what went into each layer.
        others: its other arguments by name.
        out: what came out at the end.
    """

    order: list[Any]
    hidden: list[Any]
    others: list[dict[str, Any]]
    out: Any


class _Twin:
    """A decoder on the CPU, with stand-ins for its layers."""

    def __init__(self, decoder: Any, names: Names) -> None:
        order, norm = list[Any](), decoder.get_submodule(names.norm)
        layers = nn.ModuleList(_StandIn(layer, k, order) for k, layer in enumerate(decoder.layers))
        replaced = {"layers": layers, names.embedding: _Embedding(), **stateless_ropes(decoder)}
        if any(True for _ in norm.parameters()):
            replaced[names.norm] = _StandIn(norm, "norm", order)
        self.shell: Any = copy.deepcopy(shell_of(decoder, **replaced)).eval()
        allocate_and_initialize(self.shell, seed=0)
        self.config: Any = self.shell.config
        self.embedding: Any = self.shell.get_submodule(names.embedding)

    def shorten(self) -> None:
        """Make what changes at some length change at a few tokens."""
        for name in ("attention_chunk_size", "original_max_position_embeddings"):
            if getattr(self.config, name, None):
                setattr(self.config, name, SHORT)
        for module in self.shell.modules():
            if hasattr(module, "original_max_seq_len"):
                module.original_max_seq_len = module.max_seq_len_cached = SHORT
        ropes = getattr(self.config, "rope_parameters", None) or {}
        for rope in (ropes, *ropes.values()):
            if isinstance(rope, dict) and "original_max_position_embeddings" in rope:
                rope["original_max_position_embeddings"] = SHORT

    def run(
        self,
        h_BSD: Tensor,
        positions: Tensor,
        results: list[float] | None = None,
        by_ids: bool = False,
        mask: Any = None,
    ) -> _Run:
        """
        Args:
            h_BSD: embeddings.
            positions: position ids.
            results: what each layer returns, in all of its elements; ``None``: what it gets.
            by_ids: let the decoder embed token ids itself.
            mask: attention mask.
        """
        layers = self.shell.layers
        order = layers[0].order
        order.clear()
        for k, layer in enumerate(layers):
            layer.calls.clear()
            layer.result = None if results is None else h_BSD.new_tensor(results[k]).expand(h_BSD.shape)
        self.embedding.result = h_BSD
        ids = torch.zeros(h_BSD.shape[:2], dtype=torch.long)
        given = {"input_ids": ids} if by_ids else {"inputs_embeds": h_BSD}
        out = self.shell(**given, position_ids=positions, attention_mask=mask, use_cache=False)[0]
        calls = [layer.calls[0] if layer.calls else (None, {}) for layer in layers]
        return _Run(list(order), [hidden for hidden, _ in calls], [others for _, others in calls], out)


def _about_layers(twin: _Twin, width: int) -> str:
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
            if value is _STATE:
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


def _about_packing(twin: _Twin, width: int, attention: str, position_rows: int, masks: MasksOf | None) -> str:
    twin.config._attn_implementation = attention
    twin.shorten()

    def run(*lengths: int) -> _Run:
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
