"""Code that assumes that all tensors are on one device, or on the CPU, fails on a second device: tensors that are made
in the wrong place, collectives of offloaded gradients, optimizers that step both kinds at once."""

from collections import defaultdict
from typing import Any

import pytest
import torch

from tests import second_device
from tests.ranks import free_port, run_ranks
from tests.runtime import matrix
from tests.toy import ToyData, ToyModule
from tests.training.test_training import RUNS, Run
from tests.training.trainers import _with_environment, assert_close, plain_trainer, strategy_of, weights

pytestmark = [pytest.mark.wide, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 5e-6  # of a device that sums in another order
NAMES = ("fsdp", "zero1", "offload-P1", "offload-fsdp-P2xdp2", "offload-frozen-P3", "clip-norm", "clip-value")


def _matrix(rank: int, cases: list[matrix.Case]) -> list[list[matrix.Result]]:
    return matrix.pipelined(rank, cases, f"{second_device.NAME}:0")


def test_shards_of_random_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "TOLERANCE", TOLERANCE)
    worlds = defaultdict[tuple[int, int], list[matrix.Case]](list)
    for case in matrix.cases(60):
        if case.options.sharding != matrix.ShardingOptions():
            worlds[case.dp, case.pp].append(case)
    results = {(dp, pp): second_device.ranks(dp * pp, _matrix, some) for (dp, pp), some in worlds.items()}
    for world, some in worlds.items():
        (references,) = run_ranks(1, _references, some)
        for i, (case, reference) in enumerate(zip(some, references, strict=True)):
            assert not list(matrix.differences(case, reference, [rank[i] for rank in results[world]])), case


def _references(rank: int, cases: list[matrix.Case]) -> list[list[matrix.Result]]:
    """In a process of its own: see `second_device.ranks`."""
    return [matrix.reference(case) for case in cases]


def _fit(rank: int, run: Run) -> tuple[dict[str, torch.Tensor], list[float]]:
    """And an evaluation after it, for which the Trainer moves the module once more."""
    arguments: dict[str, Any] = {"data_parallel_size": run.dp, "check_replicas_every": 2, **run.strategy}
    strategy = strategy_of(process_group_backend=second_device.BACKEND, **arguments)
    module, accelerator = ToyModule(**run.module), second_device.SecondAccelerator()
    options = {**run.trainer, "accelerator": accelerator, "devices": run.world, "strategy": strategy}
    trainer = plain_trainer(max_epochs=1, **options)
    trainer.fit(module, ToyData(**run.data))
    losses = list(module.losses)
    trainer.validate(module, ToyData(**run.data), verbose=False)
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: value.cpu() for name, value in weights(module).items()}, losses


def test_trainers() -> None:
    runs = {name: RUNS[name] for name in NAMES}
    results = {
        name: second_device.ranks(run.world, _with_environment, run.world, free_port(), _fit, (run,))
        for name, run in runs.items()
    }
    for name, run in runs.items():
        ((expected, known),) = run_ranks(1, _fit_plain, run)
        for found, losses in results[name]:
            assert losses == pytest.approx(known, rel=1e-5), name
            assert_close(found, expected, TOLERANCE)


def _fit_plain(rank: int, run: Run) -> tuple[dict[str, torch.Tensor], list[float]]:
    module = ToyModule(**run.module)
    plain_trainer(max_epochs=1, **run.trainer).fit(module, ToyData(replicas=run.dp, **run.data))
    return weights(module), module.losses
