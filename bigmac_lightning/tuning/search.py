"""Looks for the choice that takes the least time.

Layouts are looked at in the order of a rough guess of their time. Each is first simulated with one plan of each
backbone; its fastest backbones then get all policies, sizes of groups and numbers of pieces. The search ends when many
layouts in a row were slower, or when the guesses of all others are far above the best time.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from bigmac_lightning.schedule.placing.policies import POLICIES
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.tuning.evaluating import ACTIVATIONS, WEIGHTS, Evaluator, Tried
from bigmac_lightning.tuning.space import Layout, Space

REFINED = 2
"""How many backbones of a layout get all policies: the fastest with one. The number was chosen, not measured."""

SLOWER = 1.3
"""A layout whose backbones are all so many times slower than the best choice is not looked at further: other policies
gain less."""

PATIENCE = 12
"""After so many layouts in a row that were slower, the search ends."""

OVER = 1.05
"""Where weights take so many times the memory, other schedules are not tried: their stages are cut nearly alike."""

FAR = 1.3
"""The search ends at a layout whose guessed time is so many times the best one. Guesses differ from simulated times by
the bubbles."""


@dataclass
class Found:
    """The result of a search.

    Attributes:
        best: the best choice of each layout that fits, the fastest first.
        simulated: number of choices that were simulated.
        refused: why layouts were refused, and how many of them.
        left: number of layouts that were not looked at, because the time was over.
    """

    best: list[Tried] = field(default_factory=list)
    simulated: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    left: int = 0

    def add(self, tried: Tried) -> None:
        self.best = sorted([*self.best, tried], key=lambda one: (one.seconds, one.memory))


def search(
    evaluator: Evaluator,
    space: Space,
    progress: Callable[[int, int, Found], None] | None = None,
    seconds: float = math.inf,
) -> Found:
    """Search a space.

    Args:
        progress: is told the number of layouts that were looked at, that of all, and what was found so far.
        seconds: after so long, the search ends as soon as something was found.
    """
    found, since, begin = Found(), 0, time.monotonic()
    order = _ordered(evaluator, space, found)
    fits = set[Layout]()
    for number, (guess, layout) in enumerate(order):
        if progress is not None:
            progress(number, len(order), found)
        if found.best and (since > PATIENCE or guess > FAR * found.best[0].seconds):
            break
        if found.best and time.monotonic() - begin > seconds:
            found.left = len(order) - number
            break
        alike = replace(layout, sharding=space.shardings[0])
        if alike in fits:
            continue  # everything fits with shards that are sent less often
        every = _schedules(evaluator, layout, space, found)
        tried = every[0]
        if tried.problem:
            found.refused[tried.problem] += 1
            continue
        if all(one.problem != ACTIVATIONS for one in every):
            fits.add(alike)
        since = 0 if not found.best or tried.seconds < found.best[0].seconds else since + 1
        found.add(tried)
    if progress is not None:
        progress(len(order), len(order), found)
    return found


def exhaustive(evaluator: Evaluator, space: Space) -> Found:
    """Simulate every choice of a space."""
    found = Found()
    for layout in space.layouts():
        if evaluator.why_not(layout):
            continue
        for schedule in space.schedules(layout.size):
            found.simulated += 1
            tried = evaluator.evaluate(layout, schedule)
            if not tried.problem:
                found.add(tried)
    return found


def _ordered(evaluator: Evaluator, space: Space, found: Found) -> list[tuple[float, Layout]]:
    """Layouts that may fit with their guessed times, the fastest first. Those that send less come first among equal
    ones."""
    order: list[tuple[float, Layout]] = []
    for layout in space.layouts():
        if reason := evaluator.why_not(layout):
            found.refused[reason] += 1
            continue
        if layout.partition == "auto" and "even" in space.partitions and evaluator.is_even(layout):
            continue
        seconds, static = evaluator.guess(layout)
        if static > evaluator.problem.memory:
            found.refused[WEIGHTS] += 1
            continue
        order.append((seconds, layout))
    return sorted(order, key=lambda one: one[0])


def _schedules(evaluator: Evaluator, layout: Layout, space: Space, found: Found) -> list[Tried]:
    """Choices of a layout, the fastest first that fits, or else the one with the least memory.

    First each backbone is simulated once, then the fastest ones with each policy, and then the fastest of these with
    other sizes of groups and numbers of pieces.
    """
    every = list(space.schedules(layout.size))
    policy = "nested" if "nested" in space.policies else space.policies[0]
    tried = _evaluated(evaluator, layout, [one for one in every if one == _plain(one, layout, policy)] or every, found)
    best = found.best[0].seconds if found.best else float("inf")
    if tried[0].problem == WEIGHTS or (not tried[0].problem and tried[0].seconds > SLOWER * best):
        return tried
    backbones = [(one.schedule.backbone, one.schedule.virtual_stages) for one in tried[:REFINED]]
    others = [one for one in every if one == _plain(one, layout, one.policy) and one.policy != policy]
    others = [one for one in others if (one.backbone, one.virtual_stages) in backbones]
    tried = sorted([*tried, *_evaluated(evaluator, layout, others, found)], key=_order)
    first = tried[0].schedule
    rest = [replace(one, group_size=first.group_size, pieces=first.pieces) == first for one in every]
    further = [one for one, alike in zip(every, rest, strict=True) if alike and one != first]
    if tried[0].problem:  # smaller groups take less memory
        further = [one for one in every if (one.backbone, one.virtual_stages) in backbones and one.pieces == 1]
        further = [one for one in further if isinstance(one.group_size, int) and one.group_size < layout.size]
    return sorted([*tried, *_evaluated(evaluator, layout, further, found)], key=_order)


def _plain(schedule: ScheduleOptions, layout: Layout, policy: str) -> ScheduleOptions:
    """A schedule with this policy, groups of P microbatches and no pieces."""
    groups = POLICIES[policy].spread and not POLICIES[policy].own_ranks and layout.size > 1
    return replace(schedule, policy=policy, group_size=layout.size if groups else None, pieces=1)


def _evaluated(evaluator: Evaluator, layout: Layout, schedules: Iterable[ScheduleOptions], found: Found) -> list[Tried]:
    tried = list[Tried]()
    for schedule in schedules:
        tried.append(evaluator.evaluate(layout, schedule))
        if tried[-1].problem == WEIGHTS and tried[-1].memory > OVER * evaluator.problem.memory:
            break
    found.simulated += len(tried)
    return sorted(tried, key=_order)


def _order(tried: Tried) -> tuple[bool, float, float]:
    return bool(tried.problem), tried.seconds if not tried.problem else tried.memory, tried.memory
