"""AdamW with parameter groups that are the same on every rank, and a learning rate with linear warm-up."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a parameter: it is the parameter's name, the name of a module around it, or a pattern
    with ``*`` that fits its name."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
    overrides: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Two groups, of matrices and of vectors, for the defaults and for each entry of `overrides`.

    Groups without parameters are there as well: a rank holds a part of the parameters, and all ranks must have the same
    groups.

    Args:
        parameters: pairs of name and parameter. A parameter with several names may come several times.
        learning_rate, weight_decay: the defaults. Vectors (biases, norms) have no weight decay.
        overrides: "learning_rate" and "weight_decay" of those parameters that a pattern means. If several patterns mean
            a parameter, the last one counts.
    """
    named = list(parameters)
    defaults = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    groups: list[dict[str, Any]] = []
    entry_of: dict[nn.Parameter, int] = {}  # 0: the defaults
    for entry, (pattern, values) in enumerate([("", {}), *overrides.items()]):
        rate, decay = ({**defaults, **values}[name] for name in ("learning_rate", "weight_decay"))
        groups += [{"params": [], "lr": rate, "weight_decay": d} for d in (decay, 0.0)]
        for name, parameter in named:
            if entry == 0 or matches(name, pattern):
                entry_of[parameter] = entry
    for parameter, entry in entry_of.items():
        if parameter.requires_grad:
            groups[2 * entry + (parameter.ndim < 2)]["params"].append(parameter)
    return groups


def warmup_factor(step: int, warmup: int, total: int | None) -> float:
    """The factor of the learning rate at a step: a linear warm-up, then 1, or a cosine from 1 to 0.

    The schedules of transformers begin with the factor 0, so that the first step learns nothing. This one begins with
    1 / (warmup + 1).

    Args:
        warmup: the number of steps before the factor is 1.
        total: the number of all steps, at the end of which the cosine is 0; ``None``: no cosine.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if total is None:
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
