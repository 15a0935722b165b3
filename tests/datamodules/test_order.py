"""The order of a step's microbatches changes the time of the step, and not its samples."""

import random
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from bigmac_lightning.datamodules import PackingOptions
from bigmac_lightning.datamodules.loading.collate import Media, Sample, make_batch
from bigmac_lightning.datamodules.loading.source_loader import StepLoader, costliest_first
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.planner import Planner
from bigmac_lightning.training.trained import Trained
from tests.datamodules.examples import data, write_mixed

RANKS, MICROBATCHES = 4, 16


def in_order(loader: StepLoader) -> list[bool]:
    """Of each step, whether its microbatches come by their costliest item; after a look at what samples it has."""
    found: list[bool] = []
    for step, batch in zip(loader.sampler, loader, strict=True):
        given = sorted(len(m.origins) for m in batch.microbatches)
        assert given == sorted(len(part) for part in step.bins)
        names = [origin.name.split(" (")[0] for m in batch.microbatches for origin in m.origins]
        numbers = [int(name.rsplit("sample ", 1)[1]) for name in names]
        assert sorted(numbers) == sorted(index for part in step.bins for _, index in part)
        costs = [max((item.cost for item in m.media), default=0.0) for m in batch.microbatches]
        found.append(costs == sorted(costs, reverse=True))
    return found


def test_training_begins_a_step_with_its_dearest_item(tmp_path: Path) -> None:
    path = write_mixed(tmp_path, 40, videos=False)
    for ordered in (False, True):
        made = data(path, packing=PackingOptions(ordered=ordered))
        made.setup("fit")
        assert all(in_order(made.loader("train"))) != ordered
        assert not all(in_order(made.loader("val")))


def makespan(planner: Planner, parts: list[list[Sample]]) -> float:
    return planner(make_batch(parts, planner.layout)).plan.makespan


def test_costly_items_in_the_same_group_take_less_time_than_in_a_random_order() -> None:
    """Lognormal items, one to four in a microbatch: all other ranks wait for a single costly item in a group."""
    trained = Trained((True,) * RANKS, frozenset({"image"}))
    for policy in ("nested", "filled"):
        planner, ratios = Planner(PipelineOptions(ScheduleOptions(policy)), RANKS, 0, trained), []
        for seed in range(8):
            draw, parts = random.Random(seed), []
            for _ in range(MICROBATCHES):
                costs = [draw.lognormvariate(0, 1) for _ in range(draw.randint(1, 4))]
                media = [Media("image", 8 * i, 8, partial(torch.zeros, 1), cost) for i, cost in enumerate(costs)]
                parts.append([Sample([1] * 64, [False] * 64, media)])
            ratios.append(makespan(planner, costliest_first(parts)) / makespan(planner, parts))
        assert mean(ratios) < 0.985, policy
