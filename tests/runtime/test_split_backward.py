"""A split backward gives the gradients of a whole one, also where it cannot be split."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bigmac_lightning.models import HFDecoder
from bigmac_lightning.runtime.split_backward import Splits, _next_gradients, backward_input, backward_weight
from tests.models import tiny

KINDS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


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


class _Norm(nn.Module):
    """As in decoders: a vector of weights, broadcast; on either side of the product."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.weight, self.left = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 3.0, 1.5])), left

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x if self.left else x * self.weight


class _Transposed(nn.Module):
    """Transposed weights that are broadcast: their gradients are sums over the other dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.summand = nn.Parameter(torch.randn(1, 5)), nn.Parameter(torch.randn(1, 5))
        self.matrix = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        square = torch.cat([x, x[:1]])  # sums over the wrong dimension have the right shape
        square = self.factor.t() * square.t()
        return torch.addmm(self.summand.t(), square, self.matrix.t())[:4]


class _Products(nn.Module):
    """Matrix products by functions: a weight that is not transposed, one on the left, and factors other than 1."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(4, 4))
        self.scaled, self.bias = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))
        self.first = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(torch.ones(5), x, self.first.t(), alpha=3.0)
        return torch.addmm(self.bias, self.left @ (x @ self.right).tanh(), self.scaled.t(), beta=0.5, alpha=2.0)


def _with(part: nn.Module) -> Stage:
    stage = Stage()
    stage.first.append(part)
    return stage


class _Converted(nn.Linear):
    """As under autocast: the weight is converted before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return nn.functional.linear(x.double(), self.weight.double(), self.bias.double()).float()


STAGES = {
    "plain": (Stage(), True),
    "norm on the left": (_with(_Norm(left=True)), True),
    "norm on the right": (_with(_Norm(left=False)), True),
    "products": (_with(_Products()), True),
    "transposed": (_with(_Transposed()), True),
    "without bias": (_with(nn.Linear(5, 5, bias=False)), True),
    "converted": (_with(_Converted(5, 5)), True),
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
    assert [split is not None for split in known.values()] == [splits]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_weight_half_of_a_decoder_walks_to_the_weights_alone(precision: torch.dtype) -> None:
    """From a node below which the whole stage lies, the engine would walk through the stage for each weight."""
    decoder = HFDecoder(
        {
            "model_type": "qwen3",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": 8,
        }
    )
    decoder.materialize(range(2), embedding=False, head=False)
    inputs = decoder.prepare({"input_ids": torch.arange(6)[None]})
    h_BSD = torch.randn(1, 6, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        out = decoder.run_layers(h_BSD, inputs, range(2), {})
    deferred = backward_input([get_gradient_edge(out)], [torch.randn_like(out)], [h_BSD], {}, 0)
    assert deferred is not None
    weights = {id(weight) for group in deferred.groups for weight in group.weights}
    assert weights == {
        id(weight) for name, weight in decoder.named_parameters() if ".layers." in name or "model.norm" in name
    }
    assert all(_next_gradients(group) for group in deferred.groups)


FEW = ("gemma3_text", "gpt_neox", "granite", "mixtral", "olmo2", "phi", "qwen3_moe")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "kind", [*FEW, *(pytest.param(kind, marks=pytest.mark.wide) for kind in sorted(KINDS - set(FEW)))]
)
def test_decoders_of_the_library(kind: str, autocast: bool) -> None:
    """With non-default multipliers; the wide run has every decoder that a tiny config builds."""
    try:
        decoder = HFDecoder(tiny.tiny_config(kind))
        decoder.materialize(range(decoder.num_layers), embedding=True, head=True)
    except Exception as error:
        if kind in FEW:
            raise
        pytest.skip(f"refused: {error}")
    decoder.eval()
    inputs = decoder.prepare({"input_ids": torch.arange(3, 12)[None]})

    def run() -> tuple[Tensor, Tensor]:
        h_BSD = decoder.embed(inputs).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return h_BSD, decoder.run_layers(h_BSD, inputs, range(decoder.num_layers), {})

    h_BSD, out = run()
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    out.backward(gradient)
    leaves = dict(decoder.named_parameters())
    expected = {name: leaf.grad for name, leaf in leaves.items()} | {"": h_BSD.grad}
    decoder.zero_grad()
    h_BSD, out = run()
    deferred = backward_input([get_gradient_edge(out)], [gradient], [h_BSD], {}, 0)
    if deferred is not None:
        backward_weight(deferred)
    found = {name: leaf.grad for name, leaf in leaves.items()} | {"": h_BSD.grad}
    for name, one in expected.items():
        other = found[name]
        assert (other is None) == (one is None), name
        if one is not None and other is not None:
            assert (other - one).norm() <= 1e-5 * one.norm(), name


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


def test_graphs_of_the_same_nodes_with_other_connections() -> None:
    """In the second graph a weight is used twice, and the nodes have the same names in the same order."""
    one, other = (nn.Parameter(torch.tensor([value, 2.0])) for value in (3.0, 5.0))
    x = torch.tensor([7.0, 11.0], requires_grad=True)
    known: Splits = {}
    for function in (lambda: one * x + x * other, lambda: one * x + one * other, lambda: one * x + x * other):
        expected = torch.autograd.grad(function().sum(), [x, one, other])
        deferred = backward_input([get_gradient_edge(function().sum())], [None], [x], known, 0)
        if deferred is not None:
            backward_weight(deferred)
        torch.testing.assert_close([_taken(x), _taken(one), _taken(other)], list(expected))


def _taken(leaf: Tensor) -> Tensor:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    return gradient
