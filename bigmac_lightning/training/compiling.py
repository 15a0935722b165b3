"""Compiles the layers of a model one by one by torch.compile, so that equal layers share their code."""

from collections.abc import Mapping
from typing import Any

import torch

from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.contracts.parallel import ParallelSizes
from bigmac_lightning.runtime.sharding import blocks_of

DEFAULTS: dict[str, Any] = {"dynamic": True, "recompile_limit": 64}
"""`dynamic`: microbatches differ in length. `recompile_limit`: torch counts variants by Python function, and all layers
of transformers share one (that of `GradientCheckpointingLayer`); beyond its default of 8, layers would run uncompiled.
"""

GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that use CUDA graphs, which overwrite what microbatches in flight still need."""


def arguments_of(compile: bool | Mapping[str, Any], parallel: ParallelSizes) -> dict[str, Any] | None:
    """The arguments for torch.compile; ``None``: nothing is compiled.

    Args:
        compile: `BigMacStrategy(compile=...)`.

    Raises:
        TypeError: `compile` is neither a bool nor a dict.
        ValueError: it cannot be done so; the message says why.
    """
    if not isinstance(compile, bool | Mapping):
        raise TypeError(f"compile={compile!r} must be true, false, or a dict of arguments of torch.compile")
    if compile is False:
        return None
    given = {} if compile is True else dict(compile)
    options = given.get("options") or {}
    if given.get("mode") in GRAPHS or options.get("triton.cudagraphs"):
        raise ValueError(
            f"compile={given} uses CUDA graphs, whose outputs the next microbatch overwrites while the pipeline still "
            'needs them: use mode "default" or "max-autotune-no-cudagraphs"'
        )
    if parallel.peers > 1:
        raise ValueError(
            f"compile does not go with tensor_parallel_size={parallel.tensor} and context_parallel_size="
            f"{parallel.context}, with which it has not been tried: leave out one of the two"
        )
    return {**DEFAULTS, **given}


def compile_layers(module: PipelineModule, arguments: Mapping[str, Any]) -> str:
    """Compile the layers of encoders, LLM and generators.

    Returns: a text that says how many layers of which component this rank has compiled.
    """
    # With several microbatches in flight, torch may have made a further variant of a checkpointed layer's code when it
    # runs the layer again. It must take the first one that fits, as before, and not the one that was used last.
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # pyright: ignore[reportAttributeAccessIssue]
    counts = dict[str, int]()
    for kind, parts in (("encoders.", module.encoders), ("", {"llm": module.llm}), ("generators.", module.generators)):
        for name, part in parts.items():
            layers = list(blocks_of(part))
            for layer in layers:
                layer.compile(**arguments)
            counts[f"{kind}{name}"] = len(layers)
    return "layers compiled by torch.compile: " + ", ".join(f"{n} of {name}" for name, n in counts.items())
