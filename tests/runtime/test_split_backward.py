"""A split backward gives the gradients of a whole one, also where it cannot be split."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from bigmac_lightning.runtime.split_backward import Splits, backward_input, backward_weight


class Stage(nn.Module):
    """A small stage whose layer and output are handled by the given functions."""

    def __init__(
        self,
        layer: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
        out: Callable[[Tensor], Tensor] = Tensor.exp,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5), nn.LayerNorm(5))
        self.second = nn.Linear(5, 5)
        self.layer, self.out = layer, out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(x + self.layer(self.first, x)))


def _checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)


STAGES = {
    "plain": (Stage(), True),
    "sliced output": (Stage(out=lambda y: y[1:]), True),
    "transposed output": (Stage(out=lambda y: y.transpose(0, 1)), True),
    "checkpointed": (Stage(_checkpointed(reentrant=False)), False),
    "reentrant": (Stage(_checkpointed(reentrant=True)), False),
    "used twice": (Stage(lambda layer, x: layer(layer(x))), False),
    "checkpointed output": (Stage(out=lambda y: checkpoint(torch.exp, y, use_reentrant=False)), False),
}


@pytest.mark.parametrize("name", STAGES)
def test_against_a_whole_backward(name: str) -> None:
    stage, splits = STAGES[name]
    weights = list(stage.parameters())
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gradient = torch.randn(stage(x).shape, generator=torch.Generator().manual_seed(2))
    stage(x).backward(gradient)
    expected = [_taken(x), *map(_taken, weights)]

    known: Splits = {}
    for _ in range(2):  # looked at, and remembered
        edge = get_gradient_edge(stage(x))
        deferred = backward_input([edge], [gradient], [x], known, 0)
        assert (deferred is not None) == splits
        assert all((weight.grad is None) == splits for weight in weights)
        given = [_taken(x)]
        if deferred is not None:
            backward_weight(deferred)
        torch.testing.assert_close([*given, *map(_taken, weights)], expected)
    assert list(known.values()) == [splits]


def test_without_an_input_gradient_all_is_left_for_later() -> None:
    """The first stage without a trained encoder: a split would lose its weights' gradients."""
    stage = Stage()
    weights = list(stage.parameters())
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    stage(x).sum().backward()
    expected = [_taken(weight) for weight in weights]
    deferred = backward_input([get_gradient_edge(stage(x).sum())], [None], [], {}, 0)
    assert deferred is not None
    assert all(weight.grad is None for weight in weights)
    backward_weight(deferred)
    torch.testing.assert_close([_taken(weight) for weight in weights], expected)


def test_a_weight_that_no_input_leads_to_keeps_its_gradient() -> None:
    """As of a bias that is a loss of its own: no node between it and the inputs separates the two."""
    stage, alone = Stage(), nn.Parameter(torch.tensor(3.0))
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    edges = [get_gradient_edge(stage(x).sum()), get_gradient_edge(alone.square())]
    assert backward_input(edges, [None, None], [x], {}, 0) is None
    assert alone.grad == 6
    assert all(weight.grad is not None for weight in stage.parameters())


def test_an_input_that_nothing_depends_on() -> None:
    stage = Stage()
    x, unused = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    assert backward_input([get_gradient_edge(stage(x.detach()).sum())], [None], [unused], {}, 0) is None
    assert unused.grad is None
    assert all(weight.grad is not None for weight in stage.parameters())


def test_nothing_is_remembered_of_another_graph() -> None:
    """A stage may make its graph otherwise for the next microbatch: here it uses its layer twice."""
    once, twice = Stage(), Stage(lambda layer, x: layer(layer(x)))
    known: Splits = {}
    x = torch.randn(4, 5, requires_grad=True)
    for stage, splits in ((once, True), (twice, False), (once, True)):
        deferred = backward_input([get_gradient_edge(stage(x).sum())], [None], [x], known, 0)
        assert (deferred is not None) == splits


def _taken(leaf: Tensor) -> Tensor:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient
