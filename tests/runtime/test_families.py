"""Every family in a pipeline, started from the folder of a checkpoint, against the library's unsplit model."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.models import MultimodalLM
from bigmac_lightning.models.families import FAMILIES
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.models import more_families, zoo
from tests.ranks import run_ranks
from tests.runtime.matrix import whole
from tests.toy import split_layers

Case = tuple[str, bool]
"""A family, and whether rows hold several samples."""


def _cases(models: dict[str, zoo.Model]) -> list[Case]:
    return [(name, packed) for name, model in models.items() for packed in ((False, True) if model.packs else (False,))]


CASES = _cases(zoo.MODELS)
MORE = _cases(more_families.MORE)
SIZES = {2: ShardingOptions(), 3: ShardingOptions(encoders="fsdp")}
"""Numbers of pipeline ranks, and what lies in shards."""
NOT_IN_SHARDS = [name for name, family in FAMILIES.items() if family.calls_vary or name == "nemotron_h_omni"]
"""Families that refuse shards by fsdp. The last one's tower of sounds has batch norms."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in zoo.MODELS:
        zoo.save(name, folder)
    return folder


def _pipelined(rank: int, size: int, folder: Path, cases: list[Case]) -> dict[Case, Any]:
    mesh = build_mesh(torch.device("cpu"), 1, size, range(size))
    results = {}
    for name, packed in cases:
        module = MultimodalLM.from_pretrained(str(folder / name), zoo.KNOWN[name].attention)
        module.part = part_of(rank, split_layers(zoo.LAYERS, size), range(size))
        module.configure_model()
        sharding = ShardingOptions() if name in NOT_IN_SHARDS else SIZES[size]
        options = PipelineOptions(ScheduleOptions(group_size=2), sharding=sharding)
        module.runner = PipelineRunner(module, mesh, options)
        out = module.pipeline(zoo.batch(zoo.KNOWN[name], packed, module.runner.layout))
        reduce_gradients(module.runner.places, mesh)
        results[name, packed] = out.loss.item(), {n: whole(p.grad) for n, p in module.named_parameters()}
    return results


@pytest.fixture(scope="module")
def pipelined(checkpoints: Path) -> dict[int, list[dict[Case, Any]]]:
    return {size: run_ranks(size, _pipelined, size, checkpoints, CASES) for size in SIZES}


@dataclass
class Reference:
    """The unsplit model's loss and gradients, and the names of tied weights.

    Attributes:
        rounding: largest error of a gradient, measured against the same model in float64.
    """

    loss: float
    gradients: dict[str, torch.Tensor | None]
    tied: dict[str, str]
    rounding: float


@pytest.fixture(scope="module")
def references(checkpoints: Path) -> dict[Case, Reference]:
    return _references(checkpoints, CASES)


def _references(checkpoints: Path, cases: list[Case]) -> dict[Case, Reference]:
    made = {}
    for name, packed in cases:
        results = []
        for dtype in (torch.float32, torch.float64):
            whole = zoo.load(name, checkpoints, dtype)
            loss = zoo.reference_loss(whole, zoo.KNOWN[name], packed)
            loss.backward()
            results.append({n: p.grad for n, p in whole.named_parameters()})
            if dtype == torch.float32:
                made[name, packed] = Reference(loss.item(), results[0], whole.all_tied_weights_keys, 0.0)
        made[name, packed].rounding = max(error(results[0][n], results[-1][n], results[0]) for n in results[0])
    return made


def error(found: torch.Tensor | None, expected: torch.Tensor | None, all_expected: dict[str, Any]) -> float:
    """Of a gradient, relative to its norm, or to a thousandth of the largest gradient's: biases of keys have none."""
    if expected is None or not expected.any():
        assert found is None or found.norm() < 1e-9
        return 0.0
    assert found is not None
    floor = 1e-3 * max(g.norm() for g in all_expected.values() if g is not None)
    return float((found - expected).norm() / max(expected.norm(), floor))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "packed"), CASES)
def test_against_the_unsplit_model(name: str, packed: bool, size: int, references: Any, pipelined: Any) -> None:
    """Within 1e-6, or within the rounding that the unsplit model itself has in single precision."""
    reference = references[name, packed]
    seen = set()
    for loss, gradients in (rank[name, packed] for rank in pipelined[size]):
        assert loss == pytest.approx(reference.loss, rel=1e-6)
        for full_name, gradient in gradients.items():
            short = re.sub(r"^(llm|encoders\.\w+)\.", "", full_name)
            short = short if short in reference.gradients else reference.tied[short]
            seen.add(short)
            found = error(gradient, reference.gradients[short], reference.gradients)
            assert found <= max(1e-6, 2 * reference.rounding), f"{short}: {found:.1e}"
    assert reference.rounding < 3e-5
    assert seen == reference.gradients.keys()


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # Janus's; nothing changes these views in place
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "packed"), MORE)
def test_more_families(name: str, packed: bool, size: int, tmp_path: Path) -> None:
    zoo.save(name, tmp_path)
    cases = [(name, packed)]
    pipelined = {size: run_ranks(size, _pipelined, size, tmp_path, cases)}
    test_against_the_unsplit_model(name, packed, size, _references(tmp_path, cases), pipelined)


def _videos(layout: PipelineLayout) -> Batch:
    """Microbatches of videos alone."""

    def video(random: Random) -> zoo.Picture:
        draw = zoo.MODELS["qwen2_5_vl"].draw
        assert draw is not None
        return next(item for item in iter(partial(draw, random), None) if item.encoder == "video")

    made = [zoo.microbatch([[zoo.sequence(Random(seed), video)]]) for seed in range(3)]
    assign_owners(made, layout)
    return Batch(made, layout)


def _frozen_llm(rank: int, folder: Path) -> dict[str, Any]:
    mesh = build_mesh(torch.device("cpu"), 1, 2, range(2))
    module = MultimodalLM.from_pretrained(str(folder / "qwen2_5_vl"), freeze=["llm"])
    module.part = part_of(rank, split_layers(zoo.LAYERS, 2), range(2))
    module.configure_model()
    module.runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(group_size=2)))
    module.pipeline(_videos(module.runner.layout))
    reduce_gradients(module.runner.places, mesh)
    return {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


def test_videos_train_the_tower_of_images(checkpoints: Path) -> None:
    """Their encoder has no parameters of its own: below a frozen LLM they are all there is to learn from."""
    module = MultimodalLM.from_pretrained(str(checkpoints / "qwen2_5_vl"), freeze=["llm"])
    module.configure_model()
    module.pipeline(_videos(PipelineLayout())).loss.backward()
    expected = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    for gradients in run_ranks(2, _frozen_llm, checkpoints):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert error(gradient, expected[name], expected) <= 2e-6, name
