"""When encoder activations are alive, measured: pieces are freed one by one, and `recompute` keeps none."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from bigmac_lightning.runtime.measure.memory import MemoryTracker
from bigmac_lightning.runtime.measure.trace import Trace
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.runtime.test_parity import planned_in_pieces
from tests.toy import ToyModule, split_layers, toy_batch

SIZE, MICROBATCHES = 2, 8


class _Watched(Trace):
    """Notes the encoder bytes alive after each action."""

    def __init__(self, memory: MemoryTracker) -> None:
        super().__init__(torch.device("cpu"))
        self.memory = memory
        self.alive: dict[str, int] = {}

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        yield
        self.alive[str(action)] = self.memory.live.get("encoder", 0)


def _run(rank: int, policy: str, pieces: int, dropout: float) -> tuple[dict[str, int], int, list[Any]]:
    options = PipelineOptions(ScheduleOptions(policy, group_size=4))
    stage_rank = options.stage_rank(SIZE)
    mesh = build_mesh(torch.device("cpu"), 1, SIZE, stage_rank)
    module = ToyModule()
    if dropout:
        for encoder in module.encoders.values():
            encoder.tower.append(nn.Dropout(dropout))  # type: ignore[union-attr]
    module.part = part_of(rank, split_layers(4, SIZE), stage_rank)
    module.configure_model()
    runner = PipelineRunner(module, mesh, options)
    memory = runner.executor.memory = MemoryTracker(module.parameters())
    trace = runner.executor.trace = _Watched(memory)
    batch = toy_batch(MICROBATCHES, runner.layout).useful()
    if pieces > 1:
        batch.planned = planned_in_pieces(runner, batch, pieces)
    torch.manual_seed(rank)
    runner(batch.replace(), "train")
    gradients = [parameter.grad for parameter in module.parameters()]
    return trace.alive, memory.peak["encoder"], [*gradients, torch.get_rng_state()]


def test_a_piece_frees_its_activations_at_once() -> None:
    """Rank 1 has group 0's share in two pieces, and group 1's in three."""
    alive, _, _ = run_ranks(SIZE, _run, "upfront", 3, 0.0)[1]
    pieces = ["EB0.0/2", "EB0.1/2", "EB1.0/3", "EB1.1/3", "EB1.2/3"]
    assert [text for text in alive if text.startswith("EB")] == pieces
    left = [alive[text] for text in pieces]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 3
    assert left[-1] == 0


def test_recompute_keeps_nothing_between_its_actions() -> None:
    kept, kept_peak, _ = run_ranks(SIZE, _run, "upfront", 1, 0.0)[0]
    alive, peak, _ = run_ranks(SIZE, _run, "recompute", 1, 0.0)[0]
    assert max(kept.values()) == kept_peak
    assert set(alive.values()) == {0}
    assert 0 < peak < kept_peak


@pytest.mark.parametrize("pieces", [1, 3])
def test_recompute_draws_the_same_dropout(pieces: int) -> None:
    """Gradients as of `upfront`, which runs each encoder forward once, and the generator left in the same state."""
    for one, other in zip(
        run_ranks(SIZE, _run, "upfront", pieces, 0.5),
        run_ranks(SIZE, _run, "recompute", pieces, 0.5),
        strict=True,
    ):
        torch.testing.assert_close(one[2], other[2], rtol=0, atol=0)
    without = run_ranks(SIZE, _run, "upfront", pieces, 0.0)
    assert any(not torch.equal(a, b) for a, b in zip(without[1][2][:-1], one[2][:-1], strict=True) if a is not None)


def _outputs(rank: int, backbone: str) -> tuple[int, int]:
    """How many hidden states a rank has made for another one, and how many of them are alive when their backward
    starts."""
    stage_rank = PipelineOptions(ScheduleOptions(backbone=backbone)).stage_rank(SIZE)
    mesh = build_mesh(torch.device("cpu"), 1, SIZE, stage_rank)
    module = ToyModule()
    module.part = part_of(rank, split_layers(4, SIZE), stage_rank)
    module.configure_model()
    runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(backbone=backbone)))
    made, alive = list[weakref.ref[torch.Tensor]](), [0]
    run_stage = module.run_stage

    def watched(*args: Any) -> Any:
        out = run_stage(*args)
        if out.hidden is not None:
            made.append(weakref.ref(out.hidden))
        return out

    class Count(Trace):
        @contextmanager
        def action(self, action: Action) -> Iterator[None]:
            if action.kind in ("B", "I"):
                reference = made[action.index] if made else None
                alive[0] += reference is not None and reference() is not None
            yield

    module.run_stage = watched  # type: ignore[method-assign]
    runner.executor.trace = Count(torch.device("cpu"))
    runner(toy_batch(MICROBATCHES, runner.layout), "train")
    return len(made), alive[0]


@pytest.mark.parametrize("backbone", ["gpipe", "zb1p"])
def test_outputs_of_stages_are_not_kept(backbone: str) -> None:
    """Their backward needs the way to them only."""
    (made, alive), _ = run_ranks(SIZE, _outputs, backbone)
    assert made > SIZE
    assert alive == 0
