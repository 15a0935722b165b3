"""Messages do not pile up."""

import pytest
import torch

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.runtime.transport import MOST_SENDING, Transport
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import ToyModule, split_layers, toy_batch

MICROBATCHES = 24
SCHEDULES = [
    ("nested", "1f1b"),
    ("upfront", "gpipe"),
    ("filled", "interleaved_1f1b"),
    ("first_stage", "zb1p"),
    ("recompute", "looped_bfs"),
    ("nested", "zbv"),
    ("filled", "dualpipev"),
]


def _most_on_their_way(rank: int) -> list[tuple[int, int, float]]:
    """By schedule: the most messages that were on their way from this rank at a time, their number, and the loss."""
    return [_of_schedule(rank, ScheduleOptions(*names)) for names in SCHEDULES]


def _of_schedule(rank: int, schedule: ScheduleOptions) -> tuple[int, int, float]:
    options, module = PipelineOptions(schedule), ToyModule()
    stage_rank = options.stage_rank(2)
    mesh = build_mesh(torch.device("cpu"), 1, 2, stage_rank)
    module.part = part_of(rank, split_layers(4, len(stage_rank)), stage_rank)
    module.configure_model()
    runner = PipelineRunner(module, mesh, options)
    numbers, send = list[int](), Transport.send

    def noting(self: Transport, *arguments: object) -> None:
        send(self, *arguments)  # pyright: ignore[reportArgumentType]
        numbers.append(len(self._sending))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "send", noting)
        loss = runner(toy_batch(MICROBATCHES, runner.layout), "train").loss
    return max(numbers), len(numbers), float(loss)


def test_few_messages_are_on_their_way() -> None:
    module = ToyModule()
    module.configure_model()
    expected = float(module.pipeline(toy_batch(MICROBATCHES, PipelineLayout())).loss.detach())
    for found in run_ranks(2, _most_on_their_way):
        for (most, number, loss), schedule in zip(found, SCHEDULES, strict=True):
            assert number > 2 * MOST_SENDING, schedule
            assert 0 < most <= MOST_SENDING, schedule
            assert loss == pytest.approx(expected), schedule
