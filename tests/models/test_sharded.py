"""Every encoder and generator that ships, with weights in shards on two ranks that have different work, against plain
autograd in one process."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from bigmac_lightning.contracts.batch import TargetItem
from bigmac_lightning.models import FlowGenerator, MultimodalLM, VisionEncoder
from bigmac_lightning.models.generation.codec import LatentCodec
from bigmac_lightning.runtime.sharding import ShardedModule, blocks_of
from bigmac_lightning.training.sharding import Together
from tests.models import zoo
from tests.models.parts import WIDTH, image, ready
from tests.models.test_flow import DIFFUSION, codec_config
from tests.models.test_vision import GRIDS, TOWERS, picture
from tests.ranks import run_ranks
from tests.runtime.matrix import whole

PLAN = [("F", 0), ("F", 1), ("B", 0), ("F", 2), ("B", 1), ("B", 2)]
"""Forwards and backwards of groups, two of them alive at a time, as in a pipeline."""


def sharded(component: Any, computing: torch.dtype | None = None) -> Together:
    """Shards a component over all ranks; see `ShardedModule`."""
    world: Any = dist.group.WORLD
    ShardedModule(component, DeviceMesh.from_group(world, "cpu"), by_block=True, computing=computing)
    if isinstance(component, FlowGenerator):
        register_fsdp_forward_method(component, "sample")

    def calls(own: int) -> int:
        most = torch.tensor(own)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    return Together(calls, torch.device("cpu"))


def worst(component: nn.Module, reference: nn.Module) -> float:
    """The largest error of a gradient, relative to its norm, or to a thousandth of the largest gradient's."""
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    floor = 1e-3 * max(g.norm() for g in expected.values() if g is not None)
    errors = [0.0]
    for name, parameter in component.named_parameters():
        if parameter.requires_grad:
            gradient, should = whole(parameter.grad), expected[name]
            assert (gradient is not None and bool(gradient.any())) == (should is not None and bool(should.any())), name
            if gradient is not None and should is not None:
                errors.append(float((gradient - should).norm() / max(should.norm(), floor)))
    return max(errors)


def towers() -> Iterator[tuple[str, Callable[[], VisionEncoder], list[Tensor]]]:
    pictures = [picture(0, 3, 8, 8), picture(1, 3, 8, 16), picture(2, 3, 8, 8), picture(3, 2, 3, 8, 8)]
    patches = [picture(0, 1, 4, 4, 96), picture(1, 2, 2, 4, 96), picture(2, 1, 2, 2, 96), picture(3, 1, 2, 4, 96)]
    for again in (False, True):
        for kind, config in {**TOWERS, **GRIDS}.items():

            def build(config: Any = {"model_type": kind, **config}, again: bool = again) -> VisionEncoder:  # noqa: B006
                return VisionEncoder(config, WIDTH, 28, gradient_checkpointing=again)

            yield kind, build, patches if kind in GRIDS else pictures


def _encoders(rank: int) -> list[tuple[str, float]]:
    """Group 0: both ranks have items; 1: only the first; 2: only the second, of one size."""
    found: list[tuple[str, float]] = []
    for kind, build, items in towers():
        encoder = ready(build())
        reference, together = copy.deepcopy(encoder), sharded(encoder)
        groups = [[items[:3], items[3:]], [items[1:], []], [[], items[:1]]]
        for number, group in enumerate(groups):
            for item in (item for share in group for item in share):
                ((1 + number) * reference([item])).square().sum().backward()
        alive: dict[int, Tensor] = {}
        for what, number in PLAN:
            own = groups[number][rank]
            if what == "F":
                rows = [len(reference([item])) for item in own]
                alive[number] = together.encode(encoder, own, rows)
                assert len(alive[number]) == sum(rows)
            else:
                ((1 + number) * alive.pop(number)).square().sum().backward()
        found.append((kind, worst(encoder, reference)))
    return found


def test_encoders() -> None:
    for results in run_ranks(2, _encoders):
        assert len(results) == 2 * len({**TOWERS, **GRIDS})
        assert max(error for _, error in results) < 5e-6, results
        assert sorted(error for _, error in results)[len(results) // 2] < 1e-6, results


def target(seed: int, width: int = 8) -> TargetItem:
    return TargetItem("image", 2 + seed % 2, (1, 8, width), seed=seed, data=image(seed, 8, width))


def flows() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind, config in DIFFUSION.items():
        for changes in ({}, {"queries": 5}, {"gradient_checkpointing": True}):
            yield kind, {"channels": 1, "config": config, "transformer": kind, "steps": 2, **changes}
    yield "codec", {"config": DIFFUSION["qwen_image"], "codec": LatentCodec(codec_config()), "steps": 2}


def _generators(rank: int) -> list[tuple[str, float, float, float]]:
    """Kind, and the largest errors of weights' gradients, of conditions' gradients, and of samples."""
    found: list[tuple[str, float, float, float]] = []
    for kind, arguments in flows():
        torch.manual_seed(0)
        generator = ready(FlowGenerator(WIDTH, **arguments))
        for parameter in generator.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)  # gates start at zero
        reference, together = copy.deepcopy(generator), sharded(generator)
        of_conditions = of_samples = 0.0
        for shares in ([[0, 1, 2], [3]], [[4], []], [[], [5, 6]]):
            given = {seed: torch.randn(2 + seed % 2, WIDTH).requires_grad_() for share in shares for seed in share}
            items = {seed: target(seed, 8 if seed % 3 else 4) for seed in given}
            reference(list(given.values()), list(items.values())).backward()
            expected = {seed: condition.grad for seed, condition in given.items()}
            own = [given[seed].detach().requires_grad_() for seed in shares[rank]]
            together.generate(generator, own, [items[seed] for seed in shares[rank]], through=True).backward()
            for seed, condition in zip(shares[rank], own, strict=True):
                assert condition.grad is not None
                should = expected[seed]
                assert should is not None
                of_conditions = max(of_conditions, float((condition.grad - should).norm() / should.norm()))
            with torch.no_grad():
                made = together.sample(generator, own, [items[seed] for seed in shares[rank]])
                for seed, sample in zip(shares[rank], made, strict=True):
                    (should,) = reference.sample([given[seed]], [items[seed]])
                    of_samples = max(of_samples, float((sample - should).norm() / should.norm()))
        found.append((kind, worst(generator, reference), of_conditions, of_samples))
    return found


def test_generators() -> None:
    for results in run_ranks(2, _generators):
        assert len(results) == 3 * len(DIFFUSION) + 1
        assert max(max(errors) for _, *errors in results) < 5e-6, results
        assert sorted(max(errors[:2]) for _, *errors in results)[len(results) // 2] < 1e-6, results


@pytest.mark.parametrize("name", zoo.VISION_LANGUAGE)
def test_calls_of_vision_language_models(name: str, tmp_path: Any) -> None:
    """A batch runs each block once, and so does a smallest item, which makes rows. Otherwise ranks would not meet."""
    zoo.save(name, tmp_path)
    module = MultimodalLM.from_pretrained(str(tmp_path / name), zoo.MODELS[name].attention)
    module.configure_model()
    draw, calls = zoo.MODELS[name].draw, list[int]()
    assert draw is not None
    for i, block in enumerate(blocks_of(module.encoders["image"])):
        calls.append(0)
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    assert len(calls) >= 2
    pictures = [draw(zoo.Random(seed)) for seed in range(12)]
    for kind, encoder in module.encoders.items():
        assert len(encoder([encoder.smallest()])) >= 1
        items = [item.data for item in pictures if item.encoder == kind]
        batches = encoder.batches(items) if items else []
        assert sorted(i for batch in batches for i in batch) == list(range(len(items)))
        for batch in batches:
            encoder([items[i] for i in batch])
        assert set(calls) == {1 + len(batches)}
        calls[:] = [0] * len(calls)
