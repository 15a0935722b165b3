"""Backbones give the orders of the golden files and of torch, and fit any number of microbatches."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bigmac_lightning.schedule.backbones import BACKBONES, get_backbone
from bigmac_lightning.schedule.make import make_plan
from bigmac_lightning.schedule.plan import Costs
from bigmac_lightning.schedule.request import PlanRequest

from .plans import STAGES_PER_RANK

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))
SHAPES = [(name, stages) for name, numbers in STAGES_PER_RANK.items() for stages in numbers]
TORCH = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "looped_bfs": "ScheduleLoopedBFS",
    "zb1p": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_order_is_the_golden_one(path):
    match = re.fullmatch(r"(\w+)_P(\d+)_M(\d+)(?:_V(\d+))?(?:_extra(\d+))?", path.stem)
    assert match
    name, size, microbatches, stages, extra = match.groups()
    orders = BACKBONES[name].build(int(size), int(microbatches), int(extra or 0), int(stages or 1))
    assert "".join(" ".join(map(str, actions)) + "\n" for actions in orders) == path.read_text()


def test_every_backbone_has_a_golden_order():
    assert {path.stem.split("_P")[0] for path in GOLDEN} == set(BACKBONES)


@pytest.mark.parametrize("extra", [0, 1, 5])
@pytest.mark.parametrize(("name", "stages"), SHAPES)
def test_any_number_of_microbatches_runs(name, stages, extra):
    for size in (1, 2, 3, 5):
        for microbatches in (1, 2, 3, 4, 6, 9, 11):
            plan = make_plan(
                PlanRequest(
                    backbone=name,
                    virtual_stages=stages,
                    pipeline_parallel_size=size,
                    microbatches=microbatches,
                    costs=Costs(EF=0),
                    extra_in_flight=extra,
                )
            )
            one_by_one, peaks = 3 * stages * (microbatches + size - 1), plan.peak["llm_microbatches"]
            assert plan.makespan <= one_by_one + 1e-9
            if name in ("1f1b", "gpipe"):
                assert plan.makespan == pytest.approx(one_by_one)
            if name == "1f1b":
                assert peaks == [min(microbatches, size - rank + extra) for rank in range(size)]
            elif name in ("gpipe", "looped_bfs"):
                assert peaks == pytest.approx([microbatches] * size)
            elif name == "interleaved_1f1b":
                assert max(peaks) <= min(microbatches, 3 * size + extra)
            else:
                assert max(peaks) <= min(microbatches, size + (name == "dualpipev") + extra) + 1e-9


@pytest.mark.parametrize("microbatches", [4, 8, 16])
def test_zero_bubble_backbones_take_less_time_in_the_memory_of_1f1b(microbatches):
    makespans = {
        name: make_plan(
            PlanRequest(
                backbone=name,
                virtual_stages=stages,
                pipeline_parallel_size=4,
                microbatches=microbatches,
                costs=Costs(EF=0),
            )
        ).makespan
        for name, stages in (("1f1b", 1), ("interleaved_1f1b", 2), ("zb1p", 1), ("zbv", 2))
    }
    assert makespans["1f1b"] == 3 * (microbatches + 3)
    assert makespans["interleaved_1f1b"] == 3 * (microbatches + 1.5)
    assert makespans["zb1p"] == 3 * microbatches + 3
    if microbatches >= 8:
        assert makespans["zbv"] == 3 * microbatches + 1.5


@pytest.mark.parametrize(("name", "stages"), SHAPES)
def test_against_torch(name, stages):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    logging.getLogger(schedules.__name__).setLevel(logging.ERROR)
    kind, compared = getattr(schedules, TORCH[name]), 0
    for size in (1, 2, 3, 4):
        for microbatches in (1, 2, 4, 5, 8, 10, 11):
            stand_in = SimpleNamespace(num_stages=size * stages, group_size=size, group_rank=0, submod=None)
            single = issubclass(kind, schedules.PipelineScheduleSingle)
            try:
                theirs = kind(stand_in if single else [stand_in] * stages, microbatches)
            except ValueError:  # a shape that torch does not take
                continue
            if not single or getattr(theirs, "_get_pipeline_order", None):
                ours = BACKBONES[name].build(size, microbatches, 0, stages)
                order = theirs._get_pipeline_order() if single else theirs.pipeline_order
                ranks = range(size - 1) if name == "1f1b" else range(size)  # torch's text lacks F0 on its last rank
                if name == "1f1b" and microbatches < size:
                    continue
                for rank in ranks:
                    assert _texts(order[rank]) == [str(action) for action in ours[rank]]
                compared += 1
    assert compared > 5


def _texts(order: list) -> list[str]:
    """The compute actions of a torch order, overlapped ones one after the other."""
    flat = [part for action in order if action is not None for part in (action.sub_actions or (action,))]
    return [str(action) for action in flat if action.is_compute_op]


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="backbone is 'zb'; expected one of gpipe, 1f1b"):
        get_backbone("zb")
