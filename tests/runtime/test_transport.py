"""Messages do not pile up."""

import pytest
import torch

from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.runtime.transport import MOST_SENDING, Transport
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import ToyModule, split_layers, toy_batch

MICROBATCHES = 24


def _most_on_their_way(rank: int) -> tuple[int, int]:
    """The most messages that were on their way from this rank at a time, and the number of all."""
    mesh, module = build_mesh(torch.device("cpu"), 1, 2, [0, 1]), ToyModule()
    module.part = part_of(rank, split_layers(4, 2), [0, 1])
    module.configure_model()
    runner = PipelineRunner(module, mesh, PipelineOptions())
    numbers, send = list[int](), Transport.send

    def noting(self: Transport, *arguments: object) -> None:
        send(self, *arguments)  # pyright: ignore[reportArgumentType]
        numbers.append(len(self._sending))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "send", noting)
        runner(toy_batch(MICROBATCHES, runner.layout), "train")
    return max(numbers), len(numbers)


def test_few_messages_are_on_their_way() -> None:
    for most, number in run_ranks(2, _most_on_their_way):
        assert number >= MICROBATCHES
        assert 0 < most <= MOST_SENDING
