"""Finds out whether a decoder can be cut between its layers, by running its forward once with stubs for the layers.

A stage passes on hidden states alone. So between its layers a decoder may do nothing else: it may not run a layer
twice, change hidden states between two layers, or give a layer what an earlier layer has made or what depends on the
embeddings or token ids. The code of a layer itself is not looked at, only its modules and what it returns.

The answer needs no weights and is the same on every rank, so it is asked for when a model is built, before anything is
read or trained.

Shape suffixes: B samples, S tokens, D width.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..meta_model import Names
from .handed_on import SHARED_KEYS
from .rope import changes_with_length
from .stub_decoder import SHORT, STATE, StubDecoder

TOKENS = 11
"""Tokens of the probes' samples; they are more than `SHORT`."""
FAILED = "its layers hand on or need more than hidden states"


def cut(decoder: Any, names: Names, width: int) -> tuple[str, Names]:
    """Why a decoder cannot be cut between its layers ("": it can), and the names of its parts with what its layers
    return and how it scales embeddings.

    Args: see `why_not_cut`.
    """
    reasons = list[str]()
    for returned in range(3):
        for scale in dict.fromkeys((1.0, getattr(decoder, "embedding_multiplier", 1.0))):
            given = replace(names, returned=returned, scale_of_ids=scale)
            if not (reason := why_not_cut(decoder, given, width)):
                return "", given
            reasons.append(reason)
    return next((reason for reason in reasons if not reason.startswith(FAILED)), reasons[0]), names


def why_not_cut(decoder: Any, names: Names, width: int) -> str:
    """Why a decoder cannot be cut between its layers; "": it can be cut.

    Args:
        decoder: the whole decoder, on the meta device.
        names: the names of its parts.
        width: D.
    """
    return (
        _weights_problem(decoder, names)
        or probed(_layers_problem, decoder, names, width, names.scale_of_ids)
        or probed(_results_problem, decoder, names, width, decoder, names.returned)
    )


def probed(probe: Callable[..., str], decoder: Any, names: Names, *arguments: Any) -> str:
    """What a probe says of a decoder with stubs, and the error if the decoder fails with them. It may fail in any way,
    as the stubs return other things than its layers."""
    with torch.no_grad(), torch.device("cpu"):
        try:
            return probe(StubDecoder(decoder, names), *arguments)
        except Exception as problem:
            return f"{FAILED} ({type(problem).__name__}: {problem})"


@contextmanager
def attention_set_to(decoder: Any, name: str) -> Iterator[None]:
    """Gives a decoder another attention implementation for as long as the block runs."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def same(a: Any, b: Any) -> bool:
    """Whether two tensors are equal; what is not a tensor only has to be none on both sides."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor)


def _weights_problem(decoder: Any, names: Names) -> str:
    """What of the decoder's weights and modules cannot be divided among ranks."""
    around = (names.embedding, *names.with_embedding, names.norm, *names.with_norm)
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


def _layers_problem(stubs: StubDecoder, width: int, scale_of_ids: float) -> str:
    """What passes between layers beside hidden states.

    Every stub returns a constant of its own, so that the next layer's input tells whether it came unchanged. Runs with
    other embeddings, with other results and with token ids instead of embeddings tell what each argument depends on.
    In bfloat16 a conversion to float32 on the way shows as another type.
    """
    last = len(stubs.shell.layers) - 1
    positions = torch.arange(TOKENS)[None]
    one, other = torch.randn(2, 1, TOKENS, width, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    stubs.config._attn_implementation = "eager"
    # The last stub returns the same in all runs: then what comes out at the end must be the same, too.
    run = stubs.run(one, positions, results=[2.0 + k for k in range(last)] + [1.5])
    if [k for k in run.order if k != "norm"] != list(range(last + 1)):
        return f"it runs its {last + 1} layers in another order than one after another"
    if "norm" in run.order and run.order.index("norm") < last:
        return "its final norm is used before the last layer, too"
    first = run.hidden[0]
    several = stubs.handed_on.streams
    shape = (several, *one.shape) if several > 1 else one.shape
    if not isinstance(first, Tensor) or (first.shape, first.dtype) != (shape, one.dtype):
        return "what goes from layer to layer has another shape or type than the embeddings"
    for k in range(last):
        if not same(run.hidden[k + 1], one.new_tensor(2.0 + k).expand(shape)):
            return f"it changes what goes from layer {k} to layer {k + 1}"
    again = stubs.run(other, positions, results=[3.0 + k for k in range(last)] + [1.5])
    by_ids = stubs.run(one, positions, results=[2.0 + k for k in range(last)] + [1.5], by_ids=True)
    for k, others in enumerate(run.others):
        for name, value in others.items():
            if value is STATE and not (name == SHARED_KEYS and stubs.handed_on.shares_keys):
                return f"layer {k} gets {name}, by which layers can hand on more than hidden states"
            if not same(value, again.others[k].get(name)):
                return f"layer {k} gets {name}, which depends on hidden states or embeddings"
            if not same(value, by_ids.others[k].get(name)):
                return f"layer {k} gets {name}, which depends on the token ids"
    if not same(by_ids.hidden[0], first if scale_of_ids == 1.0 else first * scale_of_ids):
        return "what goes into its first layer depends on more of the token ids than their embeddings"
    if not same(run.out, again.out):
        return "what it makes at its end depends on more than what comes out of its last layer"
    return _memory_problem(stubs, one)


def _memory_problem(stubs: StubDecoder, h_BSD: Tensor) -> str:
    """Which argument of a layer depends on the length of rows before: microbatches run in any order."""
    stubs.shorten()
    before, _, after = (
        stubs.run(h_BSD[:, :length], torch.arange(length)[None]) for length in (SHORT + 1, TOKENS, SHORT + 1)
    )
    for k, others in enumerate(before.others):
        for name, value in others.items():
            if not same(value, after.others[k].get(name)):
                return f"layer {k} gets {name}, which depends on how long rows were that came before"
    return ""


def _results_problem(stubs: StubDecoder, width: int, decoder: Any, returned: int) -> str:
    """What layers return beside hidden states of their input's type, and `returned` values that the decoder does not
    use. One real layer of each kind runs on the meta
    device, in bfloat16, with the arguments that its stub got."""
    stubs.config._attn_implementation = "eager"
    h_BSD = torch.zeros(1, TOKENS, width, dtype=torch.bfloat16)
    shape = stubs.run(h_BSD, torch.arange(TOKENS)[None]).hidden[0].shape
    kinds = {tuple(map(type, layer.modules())): k for k, layer in enumerate(decoder.layers)}
    with attention_set_to(decoder, "eager"):
        for k in kinds.values():
            with suppress(Exception):  # the routing of experts may need values, which the meta device does not have
                args, kwargs = stubs.arguments_on_meta(k)
                result = copy.deepcopy(decoder.layers[k]).to(torch.bfloat16)(*args, **kwargs)
                if isinstance(result, tuple) and len(result) == returned:
                    result = result[0]
                if not isinstance(result, Tensor) or result.shape != shape:
                    return f"layer {k} returns more than hidden states"
                if result.dtype != h_BSD.dtype:
                    return (
                        f"layer {k} returns {result.dtype} where weights are {h_BSD.dtype}, which would be rounded "
                        "between stages; if the config has residual_in_fp32, set it to false"
                    )
    return ""
