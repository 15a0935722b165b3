"""Components that make only this rank's rows of their weights have the numbers of whole ones."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import SiglipVisionModel

from bigmac_lightning.models import FlowGenerator, HFDecoder, HFVisionEncoder, VisionEncoder
from bigmac_lightning.models.rows import DrawnAgainError, constructed
from tests.models import sweep, tiny, zoo
from tests.models.parts import WIDTH
from tests.models.test_flow import DIFFUSION
from tests.models.test_vision import GRIDS, TOWERS
from tests.ranks import run_ranks

WIDE = pytest.mark.wide
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
    inside = getattr(part, "tower", None) or getattr(part, "transformer", None) or part
    wrong += [name for name, parameter in inside.named_parameters() if not isinstance(parameter, DTensor)]
    return [*wrong, *expected, *buffers, *(["mode"] if part.training != whole.training else [])]


def vision(folder: Path, names: Collection[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in names:
        for weights, dtype in ((None, "float32"), (str(folder / name), "bfloat16")):
            yield name, partial(_encoder, name, weights, dtype)


def _encoder(name: str, weights: str | None, dtype: str) -> Any:
    if name in zoo.VISION_LANGUAGE:
        model = zoo.MODELS[name]
        return HFVisionEncoder(model.config(), weights=weights, attn_implementation=model.attention, dtype=dtype)
    return VisionEncoder({"model_type": name, **{**TOWERS, **GRIDS}[name]}, WIDTH, weights=weights)


def _encoders(rank: int, folder: Path, names: Collection[str]) -> list[tuple[str, list[str]]]:
    ranks = mesh()
    return [(name, difference(build, ranks)) for name, build in vision(folder, names)]


FEW = ["siglip_vision_model", "qwen3_vl", "mistral3"]


@pytest.mark.parametrize(
    "names", [FEW, pytest.param([*TOWERS, *GRIDS, *zoo.VISION_LANGUAGE], marks=WIDE)], ids=["few", "all"]
)
def test_encoders(names: list[str], tmp_path: Path) -> None:
    for name in names:
        if name in zoo.VISION_LANGUAGE:
            zoo.save(name, tmp_path)
        else:
            encoder = VisionEncoder({"model_type": name, **{**TOWERS, **GRIDS}[name]}, WIDTH, seed=1)
            encoder.materialize()
            encoder.tower.save_pretrained(tmp_path / name)
    for results in run_ranks(RANKS, _encoders, tmp_path, names):
        assert {name for name, _ in results} == set(names)
        assert not [result for result in results if result[1]]


def _generators(rank: int, folder: Path) -> list[tuple[str, list[str]]]:
    ranks, found = mesh(), list[tuple[str, list[str]]]()
    for kind, config in DIFFUSION.items():
        for source in ({"config": config, "channels": 1}, {"weights": str(folder / kind)}):

            def build(kind: str = kind, source: Any = source) -> FlowGenerator:
                return FlowGenerator(WIDTH, transformer=kind, queries=5, **source)

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


class _Tower(SiglipVisionModel):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            nn.init.normal_(self.encoder.layers[0].mlp.fc1.weight)


class _Transformer(SD3Transformer2DModel):
    @classmethod
    def from_config(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = SD3Transformer2DModel.from_config(*args, **kwargs)
        nn.init.normal_(made.transformer_blocks[0].attn.to_q.weight)
        return made


def _drawn_anew(rank: int) -> list[list[str]]:
    def encoder() -> VisionEncoder:
        made = VisionEncoder({"model_type": "siglip_vision_model", **TOWERS["siglip_vision_model"]}, WIDTH)
        made.tower.__class__ = _Tower
        return made

    def generator() -> FlowGenerator:
        made = FlowGenerator(WIDTH, channels=1, config=DIFFUSION["sd3"], transformer="sd3")
        made.kind = replace(made.kind, model=_Transformer)
        return made

    ranks = mesh()
    with pytest.raises(DrawnAgainError):
        constructed(lambda: _Transformer.from_config(generator()._arguments), ranks)
    return [difference(encoder, ranks), difference(generator, ranks)]


def test_weights_that_are_drawn_anew() -> None:
    """A model that draws a layer's weights once more, after the layer, draws all of them whole."""
    assert run_ranks(2, _drawn_anew) == [[[], []]] * 2


def _decoders(rank: int, folder: Path, names: Collection[str]) -> list[tuple[str, list[str]]]:
    """The parts of decoders that a stage has, drawn and read."""
    ranks, found = mesh(), list[tuple[str, list[str]]]()
    for name in names:
        for weights in (None, str(folder / name)):

            def build(name: str = name, weights: str | None = weights) -> Any:
                made: Any = HFDecoder(tiny.tiny_config(name), weights=weights)
                made.materialize = partial(made.materialize, [0, 2], True, True)
                return made

            found.append((name, difference(build, ranks)))
    return found


@pytest.mark.filterwarnings("ignore")  # of configs that are not ours
@pytest.mark.parametrize(
    "names", [["qwen3_moe", "llama"], pytest.param(sweep.DECODERS, marks=WIDE)], ids=["few", "all"]
)
def test_decoders(names: list[str], tmp_path: Path) -> None:
    made = list[str]()
    for name in names:
        try:
            decoder = HFDecoder(tiny.tiny_config(name), seed=1)
        except Exception:  # it is refused
            continue
        decoder.materialize(range(decoder.num_layers), True, True)
        decoder._whole.save_pretrained(tmp_path / name)
        made.append(name)
    assert len(made) >= min(len(names), 70)
    for results in run_ranks(RANKS, _decoders, tmp_path, made, timeout=900):
        assert not [result for result in results if result[1]]
