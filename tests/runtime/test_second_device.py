"""Code that assumes that all tensors are on one device, or on the CPU, fails on a second device: tensors that are made
in the wrong place, collectives of offloaded gradients, optimizers that step both kinds at once."""

import gc
import threading
import time
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.utils import _pytree as pytree

from bigmac_lightning.runtime import staging
from tests import second_device
from tests.ranks import free_port, run_ranks
from tests.runtime import matrix
from tests.toy import ToyData, ToyModule
from tests.training.test_training import RUNS, Run
from tests.training.trainers import _with_environment, assert_close, plain_trainer, strategy_of, weights

pytestmark = [pytest.mark.wide, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 5e-6  # of a device that sums in another order
BACKENDS = (second_device.BACKEND, staging.NAME)
NAMES = ("P3", "fsdp", "zero1", "offload-P1", "offload-fsdp-P2xdp2", "offload-frozen-P3", "clip-norm", "clip-value")


def _matrix(rank: int, cases: list[matrix.Case]) -> list[list[matrix.Result]]:
    return matrix.pipelined(rank, cases, f"{second_device.NAME}:0")


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_of_random_cases(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(matrix, "TOLERANCE", TOLERANCE)
    worlds = defaultdict[tuple[int, int], list[matrix.Case]](list)
    for case in matrix.cases(60):
        if case.options.sharding != matrix.ShardingOptions():
            worlds[case.dp, case.pp].append(case)
    results = {
        (dp, pp): second_device.ranks(dp * pp, _matrix, some, backend=backend) for (dp, pp), some in worlds.items()
    }
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
    backend = "gloo" if dist.get_backend() == staging.NAME else second_device.BACKEND
    strategy = strategy_of(process_group_backend=backend, **arguments)
    module, accelerator = ToyModule(**run.module), second_device.SecondAccelerator()
    options = {**run.trainer, "accelerator": accelerator, "devices": run.world, "strategy": strategy}
    trainer = plain_trainer(max_epochs=1, **options)
    trainer.fit(module, ToyData(**run.data))
    losses = list(module.losses)
    trainer.validate(module, ToyData(**run.data), verbose=False)
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: value.cpu() for name, value in weights(module).items()}, losses


@pytest.mark.parametrize("backend", BACKENDS)
def test_trainers(backend: str) -> None:
    runs = {name: RUNS[name] for name in NAMES}
    results = {
        name: second_device.ranks(run.world, _with_environment, run.world, free_port(), _fit, (run,), backend=backend)
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


def _collectives(rank: int) -> dict[str, Any]:
    """What all processes of a run get from every collective that torch's parts use on their own."""
    device, world = torch.device(second_device.NAME, 0), dist.group.WORLD
    assert world is not None
    own = torch.arange(4.0, device=device) + 10 * rank
    found: dict[str, Any] = {}
    for name, collective in {
        "sum": lambda t: dist.all_reduce(t),
        "mean": lambda t: dist.all_reduce(t, dist.ReduceOp.AVG),
        "broadcast": lambda t: dist.broadcast(t, 1),
        "reduce": lambda t: dist.reduce(t, 0),
    }.items():
        found[name] = own.clone()
        collective(found[name])
    found["whole"], found["part"] = own.new_empty(8), own.new_empty(2)
    dist.all_gather_into_tensor(found["whole"], own)
    dist.reduce_scatter_tensor(found["part"], own)
    found["lists"] = [own.new_empty(4), own.new_empty(4)]
    dist.all_gather(found["lists"], own)
    found["functional"] = [
        functional.wait_tensor(functional.all_reduce(own, "sum", world)),
        functional.wait_tensor(functional.all_gather_tensor(own, 0, world)),
        functional.wait_tensor(functional.reduce_scatter_tensor(own, "sum", 0, world)),
    ]
    leaf = own.clone().requires_grad_()
    swapped = functional.all_to_all_single_autograd(leaf, [2, 2], [2, 2], world)
    (swapped * (rank + 1)).sum().backward()
    found["swapped"] = [swapped.detach(), leaf.grad]
    twice = own.clone()
    work = dist.all_reduce(twice, async_op=True)
    assert work is not None
    assert [work.wait(), work.wait(), work.is_completed()] == [True] * 3
    found["twice"] = twice
    if rank == 0:
        sends = [dist.isend(own + k, 1) for k in range(5)]
        assert all(one is not None and one.wait() and one.is_completed() for one in sends)
    else:
        found["received"] = [own.new_empty(4) for _ in range(5)]
        for one in [dist.irecv(tensor, 0) for tensor in found["received"]]:
            assert one is not None
            one.wait()
    late = second_device.build().number_late()
    assert late >= 13 if dist.get_backend() == staging.NAME else late == 0
    if rank == 1:
        del found["reduce"]  # which rank 0 gets
    return pytree.tree_map(lambda tensor: tensor.cpu(), found)


def test_collectives_through_the_host() -> None:
    """As those that reach the device's memory directly; the order of messages too."""
    direct, staged = (second_device.ranks(2, _collectives, backend=backend) for backend in BACKENDS)
    for one, other in zip(direct, staged, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=0)
    assert [float(tensor[0]) for tensor in staged[1]["received"]] == [0, 1, 2, 3, 4]


def _in_turn(rank: int) -> list[float]:
    """Sums of tensors of the device and of the CPU in one group, in turn; rank 0 waits long for its copies."""
    device, event = torch.device(second_device.NAME, 0), second_device._Event
    at_once = event.synchronize
    event.synchronize = lambda *_: (time.sleep(0.1 * (rank == 0)), at_once())[1]
    tensors = [torch.full((3,), 10.0**k * (rank + 1), device=device if k % 2 == 0 else "cpu") for k in range(6)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in works:
        assert work is not None
        work.wait()
    if rank == 0:
        for tensor in tensors:
            dist.send(tensor, 1)
    else:
        for tensor in tensors:
            tensor.zero_()
            dist.recv(tensor, 0)
    return [float(tensor[0]) for tensor in tensors]


def test_tensors_of_both_kinds_in_one_group() -> None:
    for found in second_device.ranks(2, _in_turn, backend=staging.NAME):
        assert found == [3 * 10.0**k for k in range(6)]


def _threads(rank: int) -> None:
    device = torch.device(second_device.NAME, 0)
    group = dist.new_group([0])
    if rank == 0:
        dist.all_reduce(torch.ones(2, device=device), group=group)
        dist.destroy_process_group(group)
    names = [thread.name for thread in threading.enumerate()]
    del group
    gc.collect()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("staging") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert any(name.startswith("staging") for name in names) == (rank == 0)
    assert not any(thread.name.startswith("staging") for thread in threading.enumerate())


def test_threads_end_with_their_group() -> None:
    second_device.ranks(2, _threads, backend=staging.NAME)
