"""Loss and every gradient of the pipeline against one process on the same device."""

from collections import defaultdict
from typing import Any

import pytest
import torch

from benchmarks.places import Place
from tests.gpu.places import EVERYWHERE, ON_GPUS, arguments, ranks, trainers
from tests.layouts import measure as layouts
from tests.layouts.cases import Case, narrow
from tests.runtime import matrix
from tests.toy import ToyData, ToyModule
from tests.training.test_training import RUNS, Run
from tests.training.trainers import assert_close, pipeline_trainer, plain_trainer, weights

TOLERANCE = 2e-5  # kernels of a GPU sum in another order for other sizes
HALF = 1.5  # of the error that bfloat16 has in one process
ON_ALL_LAYOUTS = narrow()
ON_THE_CPU = ON_ALL_LAYOUTS[:2]
TRAINED = (
    "P3",
    "P2xdp2",
    "clip-norm",
    "zbv",
    "fsdp",
    "zero1-P2xdp2",
    "offload-fsdp-P2xdp2",
    "offload-frozen-P3",
    "bf16-mixed-P3",
    "zero1-bf16-mixed",
    "fp16-mixed-clipped",
)


def _matrix(rank: int, device: torch.device, cases: list[matrix.Case]) -> list[list[matrix.Result]]:
    return matrix.pipelined(rank, cases, str(device))


def _references(rank: int, device: torch.device, cases: list[matrix.Case]) -> list[list[matrix.Result]]:
    return [matrix.reference(case, str(device)) for case in cases]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("place", EVERYWHERE)
def test_random_cases(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies, backbones, frozen parts, adapters, shards and offloaded shards, and microbatches of all kinds."""
    monkeypatch.setattr(matrix, "TOLERANCE", TOLERANCE)
    worlds = defaultdict[tuple[int, int], list[matrix.Case]](list)
    for case in matrix.cases(24 if place.kind == "cpu" else 120):
        if not place.why_not(case.dp * case.pp):
            worlds[case.dp, case.pp].append(case)
    for (dp, pp), cases in worlds.items():
        found = ranks(place, dp * pp, _matrix, cases, timeout=900)
        (references,) = ranks(place, 1, _references, cases, timeout=900)
        for i, (case, reference) in enumerate(zip(cases, references, strict=True)):
            assert not list(matrix.differences(case, reference, [rank[i] for rank in found])), case


def _layout(
    rank: int, case: Case, steps: int, precision: str, strategy: dict[str, Any], trainer: dict[str, Any]
) -> layouts.Record:
    return layouts.fit_on_rank(case, steps, strategy, precision=precision, **trainer)


def _one_process(rank: int, case: Case, trainer: dict[str, Any]) -> list[layouts.Record]:
    half = layouts.fit_plain(case, 1, precision="bf16-true", **trainer)
    exact = layouts.fit_plain(case, 1, half.start, **trainer)
    return [layouts.fit_plain(case, 2, **trainer), half, exact]


LAYOUTS = [
    pytest.param(place.values[0], case, id=f"{place.id}: {case}", marks=place.marks)
    for place in EVERYWHERE
    for case in (ON_THE_CPU if place.id == "cpu" else ON_ALL_LAYOUTS)
]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("place", "case"), LAYOUTS)
def test_models(place: Place, case: Case) -> None:
    """Dense decoders, mixtures of experts and Qwen3-VL with packed rows; tensor and context peers, and shards; float32
    and bfloat16, with AdamW."""
    given = arguments(place, case.world)
    found = trainers(place, case.world, _layout, case, 2, "32-true", *given)
    found_half = trainers(place, case.world, _layout, case, 1, "bf16-true", *given)
    alone = case.in_one_process
    ((expected, half, exact),) = trainers(place, 1, _one_process, alone, arguments(place, 1)[1])
    result = layouts.compare(found, expected)
    assert result.loss < TOLERANCE
    assert result.norm < TOLERANCE
    assert result.gradient < TOLERANCE
    assert result.losses < 10 * TOLERANCE
    assert layouts.half_ratio(found_half, exact, half) < HALF


def _train(rank: int, run: Run, strategy: dict[str, Any], trainer: dict[str, Any]) -> tuple[Any, list[float]]:
    arguments: dict[str, Any] = {"data_parallel_size": run.dp, **run.strategy, **strategy}
    module = ToyModule(**run.module)
    fitting = pipeline_trainer(run.world, arguments, max_epochs=1, **run.trainer, **trainer)
    fitting.fit(module, ToyData(**run.data))
    fitting.validate(module, ToyData(**run.data), verbose=False)  # the module is moved once more
    fitting.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    return weights(module), module.losses


def _train_plain(rank: int, run: Run, trainer: dict[str, Any]) -> tuple[Any, list[float]]:
    module = ToyModule(**run.module)
    plain_trainer(max_epochs=1, **run.trainer, **trainer).fit(module, ToyData(replicas=run.dp, **run.data))
    return weights(module), module.losses


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("place", ON_GPUS)
def test_trainers(place: Place, name: str) -> None:
    run = RUNS[name]
    ((expected, losses),) = trainers(place, 1, _train_plain, run, arguments(place, 1)[1])
    for found, own in trainers(place, run.world, _train, run, *arguments(place, run.world)):
        assert own[: len(losses)] == pytest.approx(losses, rel=max(1e-4, run.tolerance))
        assert_close(found, expected, max(1e-4, run.tolerance))


def test_a_place_that_trains_on_the_cpu() -> None:
    """What the tests of GPUs do, in one run on the CPU."""
    run = RUNS["P2"]
    place = EVERYWHERE[0].values[0]
    ((expected, losses),) = trainers(place, 1, _train_plain, run, arguments(place, 1)[1])
    for found, own in trainers(place, run.world, _train, run, *arguments(place, run.world)):
        assert own[: len(losses)] == pytest.approx(losses, rel=1e-5)
        assert_close(found, expected, 2e-6)
