"""Attention of rows that are cut into slices, one for each rank of context parallelism.

All that a decoder computes for each token, it computes for the slice. Only attention needs the whole row: there the
ranks exchange slices of the row with all heads for whole rows with some of the heads, run the attention implementation
that the user chose, and exchange back (DeepSpeed-Ulysses, arXiv 2309.14509). The exchange is an attention function that
is registered with the library's AttentionInterface. The masks that go into it are those of whole rows.

Every rank runs the same exchanges in the same order, in the backward and under gradient checkpointing, too, since each
exchange needs the result of the one before. Dropout in attention draws other numbers than in one process.

Shape suffixes: B samples, S tokens of the whole row, H heads, D width of a head. A slice has s tokens.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bigmac_lightning.contracts.slices import WHOLE_POSITIONS

from . import attention
from .exchange import Exchange
from .multimodal_inputs import text_positions
from .rope import frequencies_of_whole_rows

EAGER = "eager_attention_forward"
"""The name that the library's modules give to the function that they call for "eager"."""
PER_HEAD = ("s_aux", "sinks")
"""Arguments of attention functions, and attributes of attention modules, with a number for each head (attention sinks).
They are cut like the heads."""
OF_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Further tensors that attention functions get, which are those of whole rows."""


def attention_over(exchange: Exchange, inner: str) -> Callable[..., Any]:
    """An attention function, with the arguments and results of those of the library, whose tokens are slices.

    Args:
        exchange: exchanges slices and heads.
        inner: the attention implementation that gets whole rows.
    """

    configs: dict[int, tuple[Any, Any]] = {}

    def config_of(config: Any) -> Any:
        """The config as the inner function has to see it, which may look up its own name there."""
        if id(config) not in configs:
            seen = copy.deepcopy(config)
            seen._attn_implementation = inner
            configs[id(config)] = config, seen  # keeps the config, and so its id
        return configs[id(config)][1]

    def exchanged_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        check_arguments(kwargs)
        kwargs.pop("position_ids", None)  # of the slice; the samples of a row are known from mask or starts
        heads = query.shape[1]
        repeats = math.lcm(key.shape[1], exchange.size) // key.shape[1]
        if repeats > 1:  # each rank needs heads of keys and values of its own
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        given = [query, key, value]
        if query.dtype == key.dtype == value.dtype:
            whole = exchange.to_heads(given)
        else:
            whole = [exchange.to_heads([tensor])[0] for tensor in given]
        local = _Local(module, whole[0].shape[1] // whole[1].shape[1], exchange, heads, config_of)
        for name in PER_HEAD:
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = local.part(kwargs[name])
        function = _eager(module) if inner == "eager" else ALL_ATTENTION_FUNCTIONS[inner]
        out, _ = function(local, *whole, attention_mask, *args, **kwargs)
        return exchange.to_slices(out), None

    return exchanged_attention


def check_arguments(arguments: dict[str, Any]) -> None:
    """
    Raises:
        TypeError: among the further arguments of an attention function is a tensor of which it is not known whether it
            belongs to heads, to tokens or to whole rows.
    """
    known = (*PER_HEAD, *OF_ROWS, "position_ids")
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in known:
            raise TypeError(f"attention gets {name}, of which it is not known how to cut it")


class _Local:
    """An attention module as an attention function sees it that has some of the module's heads."""

    def __init__(
        self, module: nn.Module, groups: int, exchange: Exchange, heads: int, config_of: Callable[[Any], Any]
    ) -> None:
        """
        Args:
            module: the attention module.
            groups: the number of heads of queries for each head of keys.
            exchange: says which of the heads these are.
            heads: the number of heads of queries of the module.
            config_of: makes of the module's config the one to be seen.
        """
        self._module, self._exchange, self._heads, self._config_of = module, exchange, heads, config_of
        self.num_key_value_groups = groups

    def part(self, per_head: Tensor) -> Tensor:
        """This rank's part of a tensor with a number for each head."""
        if per_head.shape != (self._heads,):
            raise TypeError(f"attention has sinks of shape {tuple(per_head.shape)}, but {self._heads} heads")
        return per_head.chunk(self._exchange.size)[self._exchange.rank]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name == "config":
            return self._config_of(value)
        if isinstance(value, Tensor):
            if name not in PER_HEAD:
                raise TypeError(f"attention reads {name} of its module, of which it is not known how to cut it")
            return self.part(value)
        return value


def _eager(module: nn.Module) -> Any:
    """The function that a module calls for "eager"."""
    found = getattr(inspect.unwrap(type(module).forward), "__globals__", {}).get(EAGER)
    if found is None:
        raise TypeError(f"{type(module).__name__} has no function {EAGER} for attn_implementation='eager'")
    return found


# -- decoders ----------------------------------------------------------------------------------------------------------


def cut_attention(decoder: Any, exchange: Exchange, inner: str) -> None:
    """Let a decoder's layers attend to whole rows by exchanges.

    Args:
        decoder: a decoder of the library, or a part of one.
        exchange: exchanges slices and heads.
        inner: the decoder's attention implementation.
    """
    name = f"context_parallel_{inner}_{id(exchange)}"  # what is registered keeps the exchange, and so its id
    ALL_ATTENTION_FUNCTIONS.register(name, attention_over(exchange, inner))
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    if inner in masks:
        masks.register(name, masks[inner])
    for config in {id(c): c for m in decoder.modules() if (c := getattr(m, "config", None)) is not None}.values():
        config._attn_implementation = name


@contextmanager
def masks_of_whole_rows(h_BsD: Tensor, positions_BS: Tensor) -> Iterator[Tensor]:
    """Within this context, the library makes masks of whole rows, though it is given slices.

    Args:
        h_BsD: hidden states of the slice.
        positions_BS: the text positions of the whole rows.

    Yields: a tensor that takes no memory, for functions of the library that read shape, type and device of whole rows.
    """
    whole_BSD = h_BsD.new_empty(()).expand(*positions_BS.shape, h_BsD.shape[-1])
    originals = masking_utils._preprocess_mask_arguments, masking_utils.remap_positions_for_packed_sequence

    def preprocess(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        cache: Any,
        position_ids: Any,
        layer_idx: Any,
        encoder_hidden_states: Any = None,
    ) -> Any:
        positions = None if position_ids is None else positions_BS
        return originals[0](config, whole_BSD, attention_mask, cache, positions, layer_idx, encoder_hidden_states)

    def remap(mask_function: Any, position_ids: Any) -> Any:
        return originals[1](mask_function, positions_BS)

    masking_utils._preprocess_mask_arguments = preprocess
    masking_utils.remap_positions_for_packed_sequence = remap
    try:
        yield whole_BSD
    finally:
        masking_utils._preprocess_mask_arguments, masking_utils.remap_positions_for_packed_sequence = originals


@contextmanager
def whole_rows(
    exchange: Exchange | None, shell: nn.Module, h_BsD: Tensor, inputs: dict[str, Tensor]
) -> Iterator[Tensor]:
    """Within this context, a decoder runs on a slice of whole rows.

    Args:
        exchange: says which slice it is; ``None``: the rows are whole, and nothing is done.
        shell: the decoder.
        h_BsD: hidden states of the slice.
        inputs: the inputs of the slice.

    Yields: a tensor of the shape, type and device of whole rows, for functions that read nothing else.

    Raises:
        ValueError: whole rows are given to a rank that works on slices, or slices to one that does not.
    """
    if (exchange is None) != (WHOLE_POSITIONS not in inputs):
        raise ValueError("slices of rows are for ranks of context parallelism, which work on nothing else")
    if exchange is None:
        yield h_BsD
        return
    positions = inputs[WHOLE_POSITIONS]
    with (
        exchange.rows_of(positions.shape[-1]),
        frequencies_of_whole_rows(shell, positions, exchange.bounds),
        masks_of_whole_rows(h_BsD, text_positions(positions)) as whole_BSD,
    ):
        yield whole_BSD


def counted_tokens(
    exchange: Exchange | None, whole_BSD: Tensor, inputs: dict[str, Tensor]
) -> tuple[Tensor | None, Tensor | float | None]:
    """Which tokens count for router losses (``None``: all), and, of a slice, how many count in the whole rows.

    Args:
        exchange, inputs: see `whole_rows`, within which this is called.
        whole_BSD: what it yields.
    """
    mask_BS = inputs.get("attention_mask", inputs.get(attention.TOKENS))
    if exchange is None:
        return mask_BS, None
    if mask_BS is None:
        return None, whole_BSD[..., 0].numel()
    start, stop = exchange.bounds
    return mask_BS[:, start:stop], mask_BS.sum()
