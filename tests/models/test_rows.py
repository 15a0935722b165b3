"""Components that make only this rank's rows of their weights have the numbers of whole ones."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bigmac_lightning.models import FlowGenerator, HFVisionEncoder, VisionEncoder
from tests.models import zoo
from tests.models.parts import WIDTH
from tests.models.test_flow import DIFFUSION
from tests.models.test_vision import GRIDS, TOWERS
from tests.ranks import run_ranks

RANKS = 3  # which few numbers of rows divide


def mesh() -> DeviceMesh:
    world: Any = dist.group.WORLD
    return DeviceMesh.from_group(world, "cpu")


def difference(build: Callable[[], Any], ranks: DeviceMesh) -> list[str]:
    """What of a component with rows is not as in the same one with whole weights."""
    whole, part = build(), build()
    whole.materialize()
    part.shard_mesh = ranks
    part.materialize()
    expected, wrong = dict(whole.named_parameters()), list[str]()
    for name, parameter in part.named_parameters():
        should, found = expected.pop(name), parameter
        if isinstance(parameter, DTensor):
            assert parameter.shape == should.shape
            should, found = list(should.chunk(ranks.size())), parameter.to_local()
            should = [*should, *[should[0][:0]] * ranks.size()][ranks.get_local_rank()]
        same = torch.equal(found, should) and found.dtype == should.dtype
        wrong += [] if same and parameter.requires_grad == whole.get_parameter(name).requires_grad else [name]
    buffers = dict(whole.named_buffers())
    wrong += [name for name, buffer in part.named_buffers() if not torch.equal(buffer, buffers.pop(name))]
    return [*wrong, *expected, *buffers, *(["mode"] if part.training != whole.training else [])]


def share(component: nn.Module) -> float:
    """Of the numbers of a component, the fraction that lies in rows."""
    parameters = list(component.parameters())
    return sum(p.numel() for p in parameters if isinstance(p, DTensor)) / sum(p.numel() for p in parameters)


def vision(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    for kind, config in {**TOWERS, **GRIDS}.items():
        for weights in (None, str(folder / kind)):
            yield kind, lambda k=kind, c=config, w=weights: VisionEncoder({"model_type": k, **c}, WIDTH, weights=w)
    for name in zoo.VISION_LANGUAGE:
        for weights in (None, str(folder / name)):
            for dtype in ("float32", "bfloat16"):
                yield (
                    name,
                    lambda n=name, w=weights, d=dtype: HFVisionEncoder(
                        zoo.MODELS[n].config(), weights=w, attn_implementation=zoo.MODELS[n].attention, dtype=d
                    ),
                )


def _encoders(rank: int, folder: Path) -> list[tuple[str, list[str], float]]:
    ranks, found = mesh(), list[tuple[str, list[str], float]]()
    for name, build in vision(folder):
        component = build()
        component.shard_mesh = ranks
        component.materialize()
        found.append((name, difference(build, ranks), share(component)))
    return found


def test_encoders(tmp_path: Path) -> None:
    for name in zoo.VISION_LANGUAGE:
        zoo.save(name, tmp_path)
    for kind, config in {**TOWERS, **GRIDS}.items():
        encoder = VisionEncoder({"model_type": kind, **config}, WIDTH, seed=1)
        encoder.materialize()
        encoder.tower.save_pretrained(tmp_path / kind)
    for results in run_ranks(RANKS, _encoders, tmp_path):
        assert {name for name, *_ in results} == {*TOWERS, *GRIDS, *zoo.VISION_LANGUAGE}
        for name, wrong, in_rows in results:
            assert not wrong, (name, wrong)
            print(name, in_rows)


def _generators(rank: int, folder: Path) -> list[tuple[str, list[str]]]:
    ranks, found = mesh(), list[tuple[str, list[str]]]()
    for kind, config in DIFFUSION.items():
        for source in ({"config": config, "channels": 1}, {"weights": str(folder / kind)}):

            def build(kind: str = kind, source: Any = source) -> FlowGenerator:
                return FlowGenerator(WIDTH, transformer=kind, queries=5, **source)

            component = build()
            component.shard_mesh = ranks
            component.materialize()
            assert share(component.transformer) == 1, "no constructor draws anything anew"
            found.append((kind, difference(build, ranks)))
    return found


@pytest.mark.parametrize("files", [1, 3])
def test_generators(files: int, tmp_path: Path) -> None:
    for kind, config in DIFFUSION.items():
        generator = FlowGenerator(WIDTH, channels=1, config=config, transformer=kind, seed=1)
        generator.materialize()
        size = {} if files == 1 else {"max_shard_size": "40KB"}
        generator.transformer.save_pretrained(tmp_path / kind, **size)
        assert (len(list((tmp_path / kind).glob("*.safetensors"))) > 1) == (files > 1)
    for results in run_ranks(RANKS, _generators, tmp_path):
        assert results == [(kind, []) for kind in DIFFUSION for _ in range(2)]
