"""Every encoder and generator that ships, with float32 shards and 16-bit computing on two ranks that have different
work, against a 16-bit copy in one process."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigmac_lightning.contracts.batch import TargetItem
from bigmac_lightning.contracts.precision import converted
from bigmac_lightning.models import FlowGenerator
from tests.models.parts import WIDTH, ready
from tests.models.test_sharded import flows, sharded, target, towers, worst
from tests.ranks import run_ranks


def _half(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def _components() -> Iterator[tuple[str, nn.Module, list[Any], Callable[..., Tensor], Callable[..., Tensor]]]:
    """Kind, component, items, and how one item and this rank's items give a number."""
    for kind, build, pixels in towers():
        yield (
            kind,
            ready(build()),
            [_half(item) for item in pixels],
            lambda encoder, item: encoder([item]).square().sum(),
            lambda together, encoder, own, rows: together.encode(encoder, own, rows).square().sum(),
        )
    for kind, arguments in flows():
        torch.manual_seed(0)
        generator = ready(FlowGenerator(WIDTH, **arguments))
        for parameter in generator.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)  # gates start at zero
        items = [
            (_half(torch.randn(2 + seed % 2, WIDTH)), converted(target(seed), torch.bfloat16)) for seed in range(4)
        ]
        yield kind, generator, items, _loss, lambda together, one, own, _: together.generate(one, *_apart(own), True)


def _loss(generator: Any, item: tuple[Tensor, TargetItem]) -> Tensor:
    return generator(*_apart([item]))


def _apart(items: list[tuple[Tensor, TargetItem]]) -> tuple[list[Tensor], list[TargetItem]]:
    return [condition.detach().requires_grad_() for condition, _ in items], [item for _, item in items]


def _compare(rank: int) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for kind, component, items, one, run in _components():
        reference, sums = copy.deepcopy(component).to(torch.bfloat16), dict[str, Tensor]()
        for buffer in component.buffers():
            buffer.data = _half(buffer) if buffer.is_floating_point() else buffer
        for item in items:
            one(reference, item).backward()
            for name, parameter in reference.named_parameters():
                if parameter.grad is not None:
                    sums[name] = sums.get(name, torch.zeros(())) + parameter.grad.float()
                    parameter.grad = None
        own = [items[:3], items[3:]][rank]
        rows = [] if isinstance(component, FlowGenerator) else [len(reference([item])) for item in own]
        for name, parameter in reference.named_parameters():
            parameter.grad_dtype = torch.float32
            parameter.grad = sums.get(name)
        together = sharded(component, torch.bfloat16)
        assert component.input_dtype() == torch.bfloat16  # pyright: ignore
        run(together, component, own, rows).backward()
        assert {p.grad.dtype for p in component.parameters() if p.grad is not None} == {torch.float32}
        found.append((kind, worst(component, reference)))
    return found


@pytest.mark.wide
def test_components() -> None:
    for results in run_ranks(2, _compare):
        assert len(results) > 20
        assert max(error for _, error in results) < 3e-2, results
