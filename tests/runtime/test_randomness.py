"""What is random in a pipeline: other numbers on each rank, the same ones when a step is repeated, and none taken from
the state that ranks share."""

from typing import Any

import torch
from torch import Tensor, nn

from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.ranks import run_ranks
from tests.toy import ToyModule, split_layers, toy_batch


class _Masks(nn.Module):
    """A dropout whose masks can be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(8) < 0.5
        self.seen.append(mask)
        return x


def _masks(rank: int, dp: int, pp: int, policy: str) -> tuple[list[list[Tensor]], list[list[Tensor]], bool]:
    """Of two steps and the first one again, the masks of the first layer; of two evaluations after the same step and
    one after another step, the masks of an encoder; whether the common state was left alone."""
    torch.manual_seed(5)
    mesh = build_mesh(torch.device("cpu"), dp, pp, range(pp))
    module = ToyModule()
    module.part = part_of(mesh.pp_rank, split_layers(4, pp), range(pp))
    module.configure_model()
    llm: Any = module.llm
    mask, of_encoder = _Masks(), _Masks()
    first = next(iter(llm.layers.values()))
    first.norm = nn.Sequential(first.norm, mask)
    for name in ("image", "audio"):
        encoder: Any = module.encoders[name]
        encoder.projector = nn.Sequential(encoder.projector, of_encoder)
    runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(policy)))
    before, steps = torch.get_rng_state(), []
    for runner.step in (0, 1, 0):
        mask.seen.clear()
        runner(toy_batch(8, runner.layout), "train")
        steps.append(list(mask.seen))
    sampled = []
    for step in (7, 7, 8):
        of_encoder.seen.clear()
        runner.begin_evaluation(step)
        for _ in range(2):
            runner(toy_batch(4, runner.layout), "sample")
        sampled.append(list(of_encoder.seen))
    return steps, sampled, torch.equal(before, torch.get_rng_state())


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_ranks_draw_other_numbers_under_any_plan() -> None:
    known: list[Any] = []
    for policy in ("nested", "recompute"):
        found = run_ranks(4, _masks, 2, 2, policy)
        for (steps, *_), (others, *_) in zip(found, known or found, strict=True):
            assert all(map(_same, steps, others)), "a plan changes what is drawn"
        known = found
        for i, (steps, _, untouched) in enumerate(found):
            assert untouched
            assert _same(steps[0], steps[2]), "a step that is repeated draws the same"
            assert not _same(steps[0], steps[1])
            assert len({tuple(mask.tolist()) for mask in steps[0]}) > 1, "microbatches differ"
            for other, *_ in found[i + 1 :]:
                assert not _same(steps[0], other[0])


def test_one_process_draws_by_step_as_well() -> None:
    """So that a run on one rank is resumed exactly, too."""
    ((steps, sampled, untouched),) = run_ranks(1, _masks, 1, 1, "nested")
    assert untouched
    assert _same(steps[0], steps[2])
    assert not _same(steps[0], steps[1])
    assert _same(sampled[0], sampled[1])
    assert not _same(sampled[0], sampled[2])
    assert len({tuple(mask.tolist()) for mask in sampled[0]}) > 1, "batches differ"
