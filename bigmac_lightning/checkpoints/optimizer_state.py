"""Optimizer states by the names of parameters, which any number of ranks can load.

``{"state": {<parameter>: {"exp_avg": ...}}, "param_groups": {<parameter>: {"lr": ...}}, "groups": [{"lr": ...}]}``: the
last one is for groups that have no parameter on a rank. A tied weight has the name of its original. Loading is left to
the optimizer itself, which knows what becomes of each entry. Knows modules and optimizers; knows no files and no ranks.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

Settings = dict[str, Any]


def named_state(module: nn.Module, copies: Mapping[str, str], optimizer: Optimizer) -> dict[str, Any]:
    """This rank's optimizer state. A parameter that never had a gradient has no entries, as in the optimizer itself.

    Args:
        copies: for each tied weight of the module, the name of the weight that it is a copy of.

    Raises:
        ValueError: the optimizer steps something that is no parameter of the module.
    """
    optimizer = bare(optimizer)
    named = list(_named(module, copies, optimizer))
    return {
        "state": {name: dict(optimizer.state[p]) for _, p, name in named if optimizer.state.get(p)},
        "param_groups": {name: _settings(group) for group, _, name in named},
        "groups": [_settings(group) for group in optimizer.param_groups],
    }


def numbered_state(
    module: nn.Module, copies: Mapping[str, str], optimizer: Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """A named state as `optimizer.load_state_dict` wants it.

    Raises:
        ValueError: it is of other parameters, or of other groups.
    """
    optimizer = bare(optimizer)
    numbers: dict[str, int] = {name: i for i, (_, _, name) in enumerate(_named(module, copies, optimizer))}
    stored: Mapping[str, Settings] = state["param_groups"]
    wrong = [f"{name}: optimized now, but not when the checkpoint was saved" for name in numbers if name not in stored]
    wrong += [f"{name}: not optimized any more" for name in stored if name not in numbers]
    if wrong:
        raise ValueError("; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    names = {id(parameter): name for _, parameter, name in _named(module, copies, optimizer)}
    alike = len(state["groups"]) == len(optimizer.param_groups)
    groups: list[Settings] = []
    for i, group in enumerate(optimizer.param_groups):
        own = [names[id(parameter)] for parameter in group["params"]]
        settings = _settings_of(own, stored, state["groups"][i] if alike else _settings(group))
        groups.append({**settings, "params": [numbers[name] for name in own]})
    return {"state": {numbers[name]: entries for name, entries in state["state"].items()}, "param_groups": groups}


def bare(optimizer: Optimizer) -> Optimizer:
    """Without Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _settings_of(names: list[str], stored: Mapping[str, Settings], fallback: Settings) -> Settings:
    """Of a group with these parameters."""
    if not names:
        return fallback
    for name in names[1:]:
        if not _equal(stored[name], stored[names[0]]):
            raise ValueError(
                f"the optimizer's groups are others: {names[0]} and {name} are in one group now, but had different "
                f"settings when the checkpoint was saved, {stored[names[0]]} and {stored[name]}"
            )
    return stored[names[0]]


def _equal(one: Settings, other: Settings) -> bool:
    same = (
        (a == b for a, b in zip(one.values(), other.values(), strict=True)) if one.keys() == other.keys() else [False]
    )
    return all(bool(equal.all()) if isinstance(equal, Tensor) else bool(equal) for equal in same)


def _settings(group: Settings) -> Settings:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _named(
    module: nn.Module, copies: Mapping[str, str], optimizer: Optimizer
) -> Iterator[tuple[Settings, Tensor, str]]:
    """(group, parameter, name) of everything the optimizer steps."""
    names = {parameter: copies.get(name, name) for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"{type(optimizer).__name__} steps a parameter of shape {tuple(parameter.shape)} that is none of "
                    f"{type(module).__name__}'s: let configure_optimizers take self.parameters()"
                )
            yield group, parameter, names[parameter]
