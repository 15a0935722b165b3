"""Every family in a pipeline, started from the folder of a checkpoint, against the library's unsplit model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmac_lightning.models import MultimodalLM
from bigmac_lightning.pipeline import PipelineRunner, part_of, split_layers
from bigmac_lightning.planning import PipelineOptions
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from tests.models import zoo
from tests.ranks import run_ranks

CASES = [(name, packed) for name, model in zoo.MODELS.items() for packed in ((False, True) if model.packs else (False,))]
SIZES = (2, 3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in zoo.MODELS:
        zoo.save(name, folder)
    return folder


def _pipelined(rank: int, size: int, folder: Path) -> dict[tuple[str, bool], Any]:
    mesh = build_mesh(torch.device("cpu"), 1, size, range(size))
    results = {}
    for name, packed in CASES:
        module = MultimodalLM.from_pretrained(str(folder / name), zoo.MODELS[name].attention)
        module.part = part_of(rank, split_layers(zoo.LAYERS, size), range(size))
        module.configure_model()
        module.runner = PipelineRunner(module, mesh, PipelineOptions(group_size=2))
        out = module.pipeline(zoo.batch(zoo.MODELS[name], packed, module.runner.layout))
        reduce_gradients(module.runner.places, mesh)
        results[name, packed] = out.loss.item(), {n: p.grad for n, p in module.named_parameters()}
    return results


@pytest.fixture(scope="module")
def pipelined(checkpoints: Path) -> Iterator[dict[int, list[dict[tuple[str, bool], Any]]]]:
    yield {size: run_ranks(size, _pipelined, size, checkpoints) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "packed"), CASES)
def test_against_the_unsplit_model(name: str, packed: bool, size: int, checkpoints: Path, pipelined: Any) -> None:
    whole = zoo.load(name, checkpoints)
    loss = zoo.reference_loss(whole, zoo.MODELS[name], packed)
    loss.backward()
    expected = {n: p.grad for n, p in whole.named_parameters()}
    floor = 1e-2 * max(g.norm() for g in expected.values() if g is not None)  # below: rounding (biases of keys, ...)
    seen = set()
    for found_loss, gradients in (rank[name, packed] for rank in pipelined[size]):
        assert found_loss == pytest.approx(loss.item(), rel=1e-6)
        for full_name, gradient in gradients.items():
            short = full_name.removeprefix("llm.").removeprefix("encoders.image.")
            short = short if short in expected else whole.all_tied_weights_keys[short]
            seen.add(short)
            reference = expected[short]
            if reference is None or not reference.any():
                assert gradient is None or not gradient.any(), short
                continue
            error = (gradient - reference).norm() / max(reference.norm(), floor)
            assert error <= 1e-6, f"{short}: {error:.1e}"
    assert seen == expected.keys()
