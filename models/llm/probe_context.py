"""Finds out whether a decoder can run on slices of rows (context parallelism), by running it with stubs for its layers.

A decoder runs on a slice as it runs on whole rows if each layer gets the slice of what it gets for whole rows, and the
mask of whole rows; and if tokens meet inside a layer only in the attention function. The first is found out with stubs
for the layers. For the second, real layers run on the meta device: their attention function must be the registered one,
and no other operation may bring tokens together.

Shape suffixes: B samples, S tokens, D width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.contracts.slices import WHOLE_POSITIONS

from ..meta_model import Names
from .context_parallel import attention_over, whole_rows
from .exchange import Exchange
from .probe_cut import attention_set_to, probed, same
from .probe_packing import LENGTHS, READABLE, counts_tokens
from .stub_decoder import SHORT, StubDecoder

TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""The types of layers in which tokens meet in the attention function alone."""
SLICE = 103
"""Tokens of a slice in the run on the meta device: a prime number, which no other size is likely to be."""
ALONG: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "select"), (1, None)),
    **dict.fromkeys(("mean", "sum", "prod", "amax", "amin", "max", "min", "std", "var", "logsumexp"), (1, None)),
    **dict.fromkeys(("_softmax", "_log_softmax", "index_select", "unfold"), (1, None)),
    "slice": (1, 0),
    "sort": (1, -1),
    "roll": (2, None),
    "topk": (2, -1),
}
"""Operations by which tokens can meet, if they run along the tokens: which of their arguments says along what, and what
it is if it is not given; ``None``: all dimensions."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
"""Products of matrices, which are the last two arguments."""


def why_not_sliced(
    decoder: Any, names: Names, width: int, implementation: str, sizes: ParallelSizes, position_rows: int = 1
) -> str:
    """Why a decoder cannot run on slices of rows; "": it can.

    Args:
        decoder: the whole decoder, on the meta device; it must be one that can be cut into stages.
        names: the names of its parts.
        width: D.
        implementation: its attention implementation.
        sizes: the number of slices, and of ranks that the heads are divided over besides.
        position_rows: 1; or 4 where positions are text, temporal, height and width (M-RoPE).
    """
    if reason := counts_tokens(decoder):
        return reason
    for k, kind in enumerate(getattr(decoder.config, "layer_types", None) or ()):
        if kind not in TYPES:
            return f"layer {k} is of the type {kind}, of which it is not known whether tokens meet in attention alone"
    for attention in READABLE:
        for kind in ("one sample", "packed", "padded"):
            if reason := probed(_arguments_problem, decoder, names, width, attention, position_rows, kind):
                return reason
    return probed(_layers_problem, decoder, names, width, implementation, position_rows, sizes, decoder)


class _NoExchange(Exchange):
    """Gives results of the right shapes. The other ranks are not there."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, None)
        self.begun = self.finished = 0

    def to_heads(self, slices: Any) -> list[Tensor]:
        start, stop = self.bounds
        self.begun += 1
        for tensor in slices:
            if tensor.ndim != 4 or tensor.shape[2] != stop - start:
                raise TypeError(f"attention gets a tensor of shape {tuple(tensor.shape)} for {stop - start} tokens")
            if tensor.shape[1] % self.size:
                raise _HeadsError(tensor.shape[1])
        shapes = [(t.shape[0], t.shape[1] // self.size, self.tokens, t.shape[3]) for t in slices]
        return [tensor.new_empty(shape) for tensor, shape in zip(slices, shapes, strict=True)]

    def to_slices(self, whole: Tensor) -> Tensor:
        self.finished += 1
        start, stop = self.bounds
        return whole.new_empty(whole.shape[0], stop - start, whole.shape[2] * self.size, whole.shape[3])


class _HeadsError(Exception):
    """The number of heads cannot be divided."""


def _positions(lengths: tuple[int, ...], position_rows: int) -> Tensor:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return positions if position_rows == 1 else positions.expand(position_rows, 1, -1)


def _arguments_problem(stubs: StubDecoder, width: int, attention: str, position_rows: int, kind: str) -> str:
    """Which argument of a layer is neither that for whole rows nor its slice."""
    stubs.config._attn_implementation = attention
    stubs.shorten()
    tokens = sum(LENGTHS)
    positions = _positions(LENGTHS if kind == "packed" else (tokens,), position_rows)
    mask = (torch.arange(tokens)[None] >= SHORT).long() if kind == "padded" else None
    h_BSD = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0))
    whole = stubs.run(h_BSD, positions, mask=mask)
    for rank in range(2):
        exchange = _NoExchange(rank, 2)
        with exchange.rows_of(tokens):
            start, stop = exchange.bounds
        h_BsD = h_BSD[:, start:stop]
        with whole_rows(exchange, stubs.shell, h_BsD, {WHOLE_POSITIONS: positions}):
            run = stubs.run(h_BsD, positions[..., start:stop], mask=mask)
        for k, others in enumerate(run.others):
            if not same(run.hidden[k], whole.hidden[k][..., start:stop, :]):
                return f"what goes into layer {k} depends on where in a row a token is"
            if names := others.keys() ^ whole.others[k].keys():
                return f"layer {k} gets {min(names)} for whole rows or for slices alone"
            for name, value in others.items():
                if not _is_part(value, whole.others[k][name], start, stop):
                    return f"layer {k} gets another {name} for a slice of a row than for the whole row"
        if not same(run.out, whole.out[:, start:stop]):
            return "what it makes at its end depends on where in a row a token is"
    return ""


def _is_part(value: Any, whole: Any, start: int, stop: int) -> bool:
    """Whether an argument is that for whole rows, or the slice of it."""
    if same(value, whole):
        return True
    if not isinstance(value, Tensor) or not isinstance(whole, Tensor) or value.ndim != whole.ndim:
        return False
    for dim, (size, of_whole) in enumerate(zip(value.shape, whole.shape, strict=True)):
        if size != of_whole:
            whole = whole.narrow(dim, start, stop - start)
    return same(value, whole)


class _Mixing(TorchDispatchMode):
    """Raises an error at an operation by which the tokens of a slice can meet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if _mixes(name, args, [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]):
            raise _MixingError(name)
        return out


def _mixes(name: str, args: Any, results: list[Tensor]) -> bool:
    """Whether tokens meet in an operation with these arguments and results. What is counted in integers (the tokens of
    an expert) is no reason."""
    given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    if any(tuple(result.shape).count(SLICE) > 1 for result in results):
        return True
    if name in PRODUCTS and given[-1].shape[-2] == SLICE:
        return True
    if not given or SLICE not in given[0].shape or not given[0].is_floating_point():
        return False
    if name in ALONG:
        place, default = ALONG[name]
        dims = args[place] if len(args) > place else default
        dims = [dims] if isinstance(dims, int) else dims or range(given[0].ndim)
        cut = name != "slice" or given[0].shape != results[0].shape
        return cut and any(given[0].shape[dim] == SLICE for dim in dims)
    if name == "constant_pad_nd":
        return SLICE in given[0].shape[-(len(args[1]) // 2) :]
    return "convolution" in name or "scaled_dot_product" in name


class _MixingError(Exception):
    """Tokens meet outside of the attention function. The message is the name of the operation."""


def _layers_problem(
    stubs: StubDecoder, width: int, implementation: str, position_rows: int, sizes: ParallelSizes, decoder: Any
) -> str:
    """What a real layer on the meta device does that a slice does not allow."""
    ranks = sizes.tensor * sizes.context
    exchange = _NoExchange(0, ranks)
    tokens = ranks * SLICE
    positions = _positions((tokens,), position_rows)
    h_BsD = torch.zeros(1, SLICE, width, dtype=torch.bfloat16)  # kernels for experts know no other type on "meta"
    readable = implementation if implementation in READABLE else "sdpa"
    stubs.config._attn_implementation = readable
    name = f"probes_context_{readable}"
    ALL_ATTENTION_FUNCTIONS[name] = attention_over(exchange, readable)
    try:
        with whole_rows(exchange, stubs.shell, h_BsD, {WHOLE_POSITIONS: positions}), attention_set_to(decoder, name):
            stubs.run(h_BsD, positions[..., :SLICE])
            tried: set[str] = set()
            for k, layer in enumerate(decoder.layers):
                if k in getattr(decoder, "cross_attention_layers", ()):
                    continue  # its tokens do not meet: they attend to images alone
                kind = _kind_of(layer, k, stubs)
                if kind not in tried and (reason := _layer_problem(layer, k, stubs, exchange, sizes)):
                    return reason
                tried.add(kind)
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
    return ""


def _kind_of(layer: nn.Module, k: int, stubs: StubDecoder) -> str:
    """A text that is the same for layers that are alike: of the same modules, with the same settings and shapes, which
    get the same kinds of arguments. Only their numbers may differ."""
    settings = [(name, type(module), _settings(module, k)) for name, module in layer.named_modules()]
    shapes = [(name, tensor.shape) for name, tensor in (*layer.named_parameters(), *layer.named_buffers())]
    given = [getattr(leaf, "shape", leaf) for leaf in tree_leaves(stubs.arguments_on_meta(k))]
    return repr((settings, shapes, given))


def _settings(module: nn.Module, k: int) -> list[tuple[str, str]]:
    """The plain attributes of a module of layer k, without the number of the layer. Configs are the same only if they
    are one object."""
    found = list[tuple[str, str]]()
    for key, value in vars(module).items():
        is_number = type(value) is int and value == k and key.endswith(("idx", "_id", "number"))
        if isinstance(value, PreTrainedConfig):
            found.append((key, str(id(value))))
        elif isinstance(value, int | float | str | tuple | list | None) and not is_number:
            found.append((key, repr(value)))
    return sorted(found)


def _layer_problem(layer: nn.Module, k: int, stubs: StubDecoder, exchange: _NoExchange, sizes: ParallelSizes) -> str:
    args, kwargs = stubs.arguments_on_meta(k)
    exchange.begun = exchange.finished = 0
    problem = ""
    try:
        with _Mixing():
            copy.deepcopy(layer).to(torch.bfloat16)(*args, **kwargs)
    except _HeadsError as error:
        over = f"{sizes.context} ranks" + (f" times {sizes.tensor} of tensor parallelism" if sizes.tensor > 1 else "")
        return f"layer {k} has {error} attention heads, which cannot be divided over {over}"
    except _MixingError as error:
        return f"layer {k} brings tokens together outside of its attention function (by {error})"
    except NotImplementedError as error:  # routing may need values, which the meta device does not have
        problem = f" ({type(error).__name__}: {error})"
    except Exception as error:
        return f"layer {k} cannot work on slices ({type(error).__name__}: {error})"
    if exchange.begun != exchange.finished:
        return f"the attention of layer {k} cannot work on some of its heads{problem}"
    if not exchange.begun:
        return f"layer {k} does not call its attention function by the library's interface{problem}"
    return ""
