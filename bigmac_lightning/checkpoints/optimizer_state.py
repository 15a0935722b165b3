"""Optimizer states by the names of parameters, which any number of ranks can load.

``{"state": {<parameter>: {"exp_avg": ...}}, "param_groups": {<parameter>: {"lr": ...}}, "groups": [{"lr": ...}]}``.
"groups" is for parameter groups that have no parameter on a rank. A tied weight goes by the name of its original. The
optimizer itself loads the state, because only it knows which dtype and device each entry gets.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from bigmac_lightning.checkpoints.mismatches import first_few

Hyperparameters = dict[str, Any]
"""What a parameter group holds besides its parameters: "lr", "weight_decay", ..."""


def named_state(module: nn.Module, copies: Mapping[str, str], optimizer: Optimizer) -> dict[str, Any]:
    """This rank's optimizer state, by name. A parameter that never had a gradient has no entry in "state".

    Args:
        copies: for each tied weight of the module, the name of the weight that it is a copy of.

    Raises:
        ValueError: the optimizer updates a tensor that is not a parameter of the module.
    """
    optimizer = bare(optimizer)
    named = list(_named(module, copies, optimizer))
    groups = {id(group): _hyperparameters(group) for group in optimizer.param_groups}
    return {
        "state": {name: dict(optimizer.state[p]) for _, p, name in named if optimizer.state.get(p)},
        "param_groups": {name: groups[id(group)] for group, _, name in named},  # a pickle holds each only once
        "groups": list(groups.values()),
    }


def numbered_state(
    module: nn.Module, copies: Mapping[str, str], optimizer: Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """A named state in the form that `optimizer.load_state_dict` takes.

    Raises:
        ValueError: the state belongs to other parameters, or to other groups.
    """
    optimizer = bare(optimizer)
    numbers: dict[str, int] = {name: i for i, (_, _, name) in enumerate(_named(module, copies, optimizer))}
    stored: Mapping[str, Hyperparameters] = state["param_groups"]
    wrong = [f"{name}: optimized now, but not when the checkpoint was saved" for name in numbers if name not in stored]
    wrong += [f"{name}: not optimized any more" for name in stored if name not in numbers]
    if wrong:
        raise ValueError(first_few(wrong))
    names = {id(parameter): name for _, parameter, name in _named(module, copies, optimizer)}
    same_number = len(state["groups"]) == len(optimizer.param_groups)
    groups: list[Hyperparameters] = []
    for i, group in enumerate(optimizer.param_groups):
        own = [names[id(parameter)] for parameter in group["params"]]
        fallback = state["groups"][i] if same_number else _hyperparameters(group)
        groups.append({**_common(own, stored, fallback), "params": [numbers[name] for name in own]})
    return {"state": {numbers[name]: entries for name, entries in state["state"].items()}, "param_groups": groups}


def bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer without Lightning's wrapper."""
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _common(names: list[str], stored: Mapping[str, Hyperparameters], fallback: Hyperparameters) -> Hyperparameters:
    """The hyperparameters that all of these parameters had when the checkpoint was saved.

    Args:
        fallback: the hyperparameters of a group without parameters.
    """
    if not names:
        return fallback
    for name in names[1:]:
        if not _equal(stored[name], stored[names[0]]):
            raise ValueError(
                f"the optimizer's groups have changed: {names[0]} and {name} are in one group now, but had different "
                f"settings when the checkpoint was saved, {stored[names[0]]} and {stored[name]}"
            )
    return stored[names[0]]


def _equal(one: Hyperparameters, other: Hyperparameters) -> bool:
    same = (
        (a == b for a, b in zip(one.values(), other.values(), strict=True)) if one.keys() == other.keys() else [False]
    )
    return all(bool(equal.all()) if isinstance(equal, Tensor) else bool(equal) for equal in same)


def _hyperparameters(group: dict[str, Any]) -> Hyperparameters:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _named(
    module: nn.Module, copies: Mapping[str, str], optimizer: Optimizer
) -> Iterator[tuple[dict[str, Any], Tensor, str]]:
    """(group, parameter, name) of every parameter that the optimizer updates."""
    names = {parameter: copies.get(name, name) for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"{type(optimizer).__name__} updates a tensor of shape {tuple(parameter.shape)} that is none of "
                    f"{type(module).__name__}'s: let configure_optimizers take self.parameters()"
                )
            yield group, parameter, names[parameter]
