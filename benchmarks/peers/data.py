"""The data of a case: the same microbatches for all peers, cut in the way that each of them takes them.

Every microbatch has the same numbers of tokens, labels and targets. So the mean of the losses of microbatches, which
data-parallel training with accumulation takes, is the loss of the whole step; and messages have one shape, which
torch.distributed.pipelining needs.
"""

from functools import partial
from random import Random

import torch
from torch.utils.data import DataLoader

from benchmarks.peers import computing, sleeping
from benchmarks.peers.case import ITEMS, TARGETS, Case
from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.owners import assign_owners

SLEEPING_ROWS, CONDITIONS = 2, 4


def media_costs(case: Case, step: int) -> list[list[float]]:
    """The encoder forward time of each item of each microbatch of a step."""
    if case.regime == "compute":
        chance = Random(step)
        return [[1.0] * chance.randint(1, ITEMS) for _ in range(case.microbatches)]
    return _drawn(case, case.encoder, ITEMS, step)


def target_costs(case: Case, step: int) -> list[list[float]]:
    """The time of each target's forward and backward."""
    if case.regime == "compute":
        return [[1.0]] * case.microbatches
    return _drawn(case, case.generator, TARGETS, 1000 + step) if case.generator else [[]] * case.microbatches


def _drawn(case: Case, mean: float, items: int, step: int) -> list[list[float]]:
    """Lognormal times whose mean over the microbatches of a step is as given. The microbatch with the costliest item
    comes first, as `MultimodalDataModule` orders them."""
    chance = Random(10_000 * case.seed + step)
    rows = [[chance.lognormvariate(0, case.sigma) for _ in range(items)] for _ in range(case.microbatches)]
    factor = mean * case.microbatches / sum(map(sum, rows))
    return [[factor * cost for cost in row] for row in sorted(rows, key=max, reverse=True)]


def step_batch(case: Case, step: int, layout: PipelineLayout) -> Batch:
    """All microbatches of a step, with the data that this rank owns."""
    media, targets = media_costs(case, step), target_costs(case, step)
    made = [_microbatch(case, step, m, media[m], targets[m]) for m in range(case.microbatches)]
    assign_owners(made, layout)
    return _with_data(case, step, made, range(case.microbatches), layout)


def single_batch(case: Case, step: int, m: int) -> Batch:
    """One microbatch of a step, whole."""
    microbatch = _microbatch(case, step, m, media_costs(case, step)[m], target_costs(case, step)[m])
    return _with_data(case, step, [microbatch], [m], PipelineLayout())


def step_loader(case: Case, steps: int, layout: PipelineLayout) -> DataLoader[Batch]:
    """One batch a step."""
    return _loader(case, range(steps), partial(_collated_step, case, layout))


def single_loader(case: Case, steps: int, rank: int) -> DataLoader[Batch]:
    """The microbatches of one replica out of P, one after the other: M / P of each step."""
    each = [(step, m) for step in range(steps) for m in range(rank, case.microbatches, case.size)]
    return _loader(case, each, partial(_collated_single, case))


def _loader(case: Case, samples: object, collate: object) -> DataLoader[Batch]:
    """Where layers compute, a worker loads the data. (Where they sleep, data take no time.)"""
    workers = int(case.regime == "compute")
    return DataLoader(samples, batch_size=1, collate_fn=collate, num_workers=workers)  # pyright: ignore


def _collated_step(case: Case, layout: PipelineLayout, samples: list[int]) -> Batch:
    return step_batch(case, samples[0], layout)


def _collated_single(case: Case, samples: list[tuple[int, int]]) -> Batch:
    return single_batch(case, *samples[0])


def _microbatch(case: Case, step: int, m: int, media: list[float], targets: list[float]) -> Microbatch:
    """A microbatch without data: media first, then labelled text, and at the end the conditions of the targets."""
    random = torch.Generator().manual_seed(1000 * step + m)
    rows, vocabulary = (
        (SLEEPING_ROWS, sleeping.VOCABULARY) if case.regime == "sleep" else (computing.ROWS, computing.VOCABULARY)
    )
    text = 4 * rows
    tokens = ITEMS * rows + text + TARGETS * CONDITIONS
    shape = (3, computing.IMAGE // 4, computing.IMAGE // 4)
    ids = torch.randint(vocabulary, (1, tokens), generator=random)
    return Microbatch(
        {"input_ids": ids, "position_ids": torch.arange(tokens)[None]},
        label_positions=torch.arange(ITEMS * rows, ITEMS * rows + text),
        labels=ids[0, ITEMS * rows + 1 : ITEMS * rows + text + 1],
        media=[MediaItem("image", rows, cost) for cost in media],
        media_positions=torch.arange(len(media) * rows),
        targets=[
            TargetItem("drawing", CONDITIONS, shape, 10_000 * step + 10 * m + i, cost) for i, cost in enumerate(targets)
        ],
        target_positions=torch.arange(tokens - len(targets) * CONDITIONS, tokens),
    )


def _with_data(case: Case, step: int, made: list[Microbatch], numbers: object, layout: PipelineLayout) -> Batch:
    """A batch in which the items that this rank owns have their data, drawn by the item's place in the step."""
    for m, microbatch in zip(numbers, made, strict=True):  # pyright: ignore[reportArgumentType]
        for i, item in enumerate(microbatch.media):
            if layout.owns(item):
                item.data = _pixels(case, item, torch.Generator().manual_seed(10_000 * step + 10 * m + i))
        for i, target in enumerate(microbatch.targets):
            if layout.owns(target):
                random = torch.Generator().manual_seed(5_000 + 10_000 * step + 10 * m + i)
                target.data = torch.randn(target.shape if case.regime == "compute" else (1,), generator=random)
    return Batch(made, layout)


def _pixels(case: Case, item: MediaItem, random: torch.Generator) -> torch.Tensor:
    if case.regime == "compute":
        return torch.randn(3, computing.IMAGE, computing.IMAGE, generator=random)
    pixels = torch.randn(item.rows, 1 + sleeping.WIDTH, generator=random)
    pixels[0, 0] = item.cost
    return pixels
