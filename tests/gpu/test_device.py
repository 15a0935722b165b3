"""Waits of the host, events, memory, and cards that ranks share."""

import re
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks.gpu.measuring import peaks
from benchmarks.gpu.model import SMALL, TINY
from benchmarks.places import ONE_CARD, Place
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.lowering import Compute
from bigmac_lightning.runtime.measure.trace import Span, Trace
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.nonfinite import FiniteCheck
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.gpu.places import EVERYWHERE, ON_GPUS, arguments, param, ranks, trainers
from tests.runtime.test_real_models import LAYERS, batch, build
from tests.toy import ToyData, ToyModule, split_layers
from tests.training.trainers import pipeline_trainer

WAITS = "synchronizing CUDA operation"  # of torch.cuda.set_sync_debug_mode


def _runner(rank: int, device: torch.device, size: int) -> tuple[PipelineRunner, Any]:
    mesh = build_mesh(device, 1, size, range(size))
    module = build("qwen3", tied=True)
    module.part = part_of(rank, split_layers(LAYERS, size), range(size))
    module.configure_model()
    module.to(device)
    runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(group_size=2)))
    return runner, module.prepare(batch(runner.layout)).to(device)


def _waits(rank: int, device: torch.device, size: int) -> list[str]:
    runner, given = _runner(rank, device, size)
    runner.finite = FiniteCheck(Ranks(), runner.module, runner.mesh, gradients=True)
    for _ in range(2):  # communicators, pinned memory, and the first batch's checks
        runner(given, "train", reduce=True)
    finite, runner.finite = runner.finite, None
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner(given, "train")  # raises if anything waits for the device
    finally:
        torch.cuda.set_sync_debug_mode("default")
    runner.finite = finite
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        runner(given, "train", reduce=True)
        torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in caught if WAITS in str(one.message)]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("place", ON_GPUS)
def test_a_step_waits_for_the_device_once(place: Place, size: int) -> None:
    """For all it reads at its end: the parameters that any rank has used, and whether the step is finite. See also
    tests/runtime/test_host_waits.py."""
    for waits in ranks(place, size, _waits, size):
        assert len(waits) == 1, waits


def _traced(rank: int, device: torch.device, size: int) -> tuple[list[Span], list[str]]:
    runner, given = _runner(rank, device, size)
    runner(given, "train")
    trace = runner.executor.trace = Trace(device)
    runner(given, "train")
    spans = trace.spans()
    assert trace.is_over()
    planned = runner.last_planned
    assert planned is not None
    return spans, [str(one.action) for one in planned.program if isinstance(one, Compute)]


@pytest.mark.parametrize("place", EVERYWHERE)
def test_traces(place: Place) -> None:
    """A span for each action, in the order of the program, none before the one before it has ended."""
    for spans, actions in ranks(place, 2, _traced, 2):
        assert [span.action for span in spans] == actions
        assert all(span.end > span.start > 0 for span in spans)
        assert all(later.start >= span.end for span, later in pairwise(spans))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", EVERYWHERE)
def test_memory(place: Place) -> None:
    """Flat in the number of microbatches, and about what is estimated before a run."""
    sizes = TINY if place.kind == "cpu" else SMALL
    found = ranks(place, 2, _peaks, place, sizes)
    first, last = sizes.counts[0], sizes.counts[-1]
    estimates = sizes.estimate(2, last, "nested")
    for rank, (row, estimate) in enumerate(zip(found, estimates, strict=True)):
        nested, upfront = row["nested"], row["upfront"]
        assert nested[-1] <= 1.02 * nested[0], f"rank {rank}: {nested} for {first} and {last} microbatches"
        assert upfront[-1] > 1.05 * upfront[0]
        if place.kind != "cpu":  # the whole memory
            assert 0.6 < nested[-1] / estimate < 1.6, f"rank {rank}: {nested[-1]:,}, estimated {estimate:,.0f} bytes"


def _peaks(rank: int, device: torch.device, place: Place, sizes: Any) -> dict[str, list[int]]:
    return peaks(rank, 2, place, sizes, ("nested", "upfront"))


def _nccl(rank: int, trainer: dict[str, Any]) -> str:
    strategy = {"process_group_backend": "nccl", "ranks_per_device": 2}
    try:
        pipeline_trainer(2, strategy, max_steps=1, **trainer).fit(ToyModule(), ToyData(steps=1))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("place", [param(ONE_CARD, "one-card", pytest.mark.gpu)])
def test_nccl_on_a_shared_card_is_refused(place: Place) -> None:
    for said in trainers(place, 2, _nccl, arguments(place, 2)[1]):
        assert re.search("ranks 0, 1 have the same card.*gloo", said), said
