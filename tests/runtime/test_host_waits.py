"""How often the host reads a tensor's values in a training step. On a GPU each read waits for all work given before."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.ranks import Ranks
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.nonfinite import FiniteCheck
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.runtime.test_real_models import LAYERS, batch, build
from tests.toy import ToyData, ToyLLM, ToyModule, split_layers
from tests.training.trainers import on_ranks, pipeline_trainer

OPERATIONS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "unique", "_unique2")
METHODS = (Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__)


class _Operations(TorchDispatchMode):
    """Counts operations whose results the host needs."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        if name in OPERATIONS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Counts calls that read values without an operation."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in METHODS and not args[0].is_shared():  # shared memory, which the planner reads, is the host's
            self.found[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def _reads(rank: int, size: int) -> tuple[Counter[str], ...]:
    stage_rank = list(range(size))
    mesh = build_mesh(torch.device("cpu"), 1, size, stage_rank)
    module = build("qwen3", tied=True)
    module.part = part_of(rank, split_layers(LAYERS, size), stage_rank)
    module.configure_model()
    runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(group_size=2)))
    given = module.prepare(batch(runner.layout))
    runner(given, "train")  # the first batch's token ids are checked
    step, reduction, checked = Counter[str](), Counter[str](), Counter[str]()
    with _Methods(step), _Operations(step):
        runner(module.prepare(given), "train")
    with _Methods(reduction), _Operations(reduction):
        reduce_gradients(runner.places, mesh)
    runner.finite = FiniteCheck(Ranks(), module, mesh, gradients=True)
    with _Methods(checked), _Operations(checked):
        runner(module.prepare(given), "train", reduce=True)
    return step, reduction, checked


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_waits_for_the_device_once(size: int) -> None:
    """All reads of a step: the parameters that any rank has used, and whether the step is finite."""
    for step, reduction, checked in run_ranks(size, _reads, size):
        assert not step
        assert reduction == ({"tolist": 1} if size > 1 else {})
        assert checked == {"tolist": 1}


class _OnTheWay(ToyModule):
    """Notes which batches are prepared before they are moved."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.prepared = "prepared" in batch.microbatches[0].inputs
        return super().training_step(batch, batch_idx)


class _Prepares(ToyLLM):
    def prepare(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs | {"prepared": torch.ones(1)}


def _train(rank: int) -> bool:
    module = _OnTheWay()
    module.llm.__class__ = _Prepares
    pipeline_trainer(2, max_steps=1).fit(module, ToyData(steps=1))
    return module.prepared


def test_batches_are_prepared_before_they_are_moved() -> None:
    assert on_ranks(2, _train) == [True, True]
