"""The work of a batch, as plans take it: times of the actions, from given costs or from measured rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bigmac_lightning.schedule.action import Kind
from bigmac_lightning.schedule.costs import NEGLIGIBLE, Costs
from bigmac_lightning.schedule.rates import Rate, RateKey, Rates
from bigmac_lightning.schedule.workload import MicrobatchWork, Workload

OwnedCost = tuple[int, float]
"""The owner of an item, and its cost."""

OwnedCosts = Sequence[Sequence[OwnedCost]]
"""For each microbatch, those of its items."""

LLM: tuple[Kind, ...] = ("F", "B", "I", "W")
NESTED: tuple[Kind, ...] = ("EF", "EB", "G")


@dataclass(frozen=True)
class Work:
    """The work of a batch.

    Attributes:
        costs: times of the actions on a mean microbatch.
        stage_costs: per stage, its times of F, B, I and W, if stages differ.
        llm: per microbatch, its part of the LLM's work, relative to the mean.
        media, targets: per microbatch, its items: the owner, and the time of the encoder's forward or of the generator.
    """

    costs: Costs
    stage_costs: list[list[float]] | None
    llm: Sequence[float]
    media: OwnedCosts
    targets: OwnedCosts

    @property
    def workload(self) -> Workload:
        """The work of each microbatch."""
        rows = zip(self.llm, _times(self.media), _times(self.targets), strict=True)
        return Workload(tuple(MicrobatchWork(llm, encoder, generator) for llm, encoder, generator in rows))


def guessed(
    costs: Costs,
    stage_costs: list[list[float]] | None,
    llm: Sequence[float],
    media: OwnedCosts,
    targets: OwnedCosts,
) -> Work:
    """The work if the mean microbatch takes `costs`.

    Args:
        costs, stage_costs: as in `Work`.
        llm: the cost of each microbatch in any unit.
        media, targets: the costs of items in any units.
    """
    mean = sum(llm) / len(llm)
    parts = [cost / mean for cost in llm]
    return Work(costs, stage_costs, parts, _scaled(media, costs.EF), _scaled(targets, costs.G))


def measured(
    guess: Work,
    rates: Rates,
    virtual_stages: int,
    llm: Sequence[float],
    media: OwnedCosts,
    targets: OwnedCosts,
    peers: int,
) -> Work:
    """The work in seconds. What was not measured takes as long as `guess` says, relative to the LLM's forward.

    Args:
        guess: the work by guessed costs, which also say what occurs.
        virtual_stages: number of stages per rank.
        llm, media, targets: the costs of microbatches and items, in the units of those that were measured.
        peers: number of processes that divide the items of a rank.
    """
    one, llm_cost = guess.costs.per_stage(virtual_stages), sum(llm) / len(llm)
    stages = 1 + max((stage for _, stage in rates if stage is not None), default=-1)
    guesses = guess.stage_costs or [[one.F, one.B, one.I, one.W]] * stages
    forwards = [rate for stage in range(len(guesses)) if (rate := rates.get(("F", stage)))]
    if not forwards or len(forwards) < len(guesses):
        return guess
    unit = sum(rate.of(llm_cost) for rate in forwards) / sum(row[0] for row in guesses)  # seconds of a guessed time
    least, parts, rows = NEGLIGIBLE * unit * one.F, [0.0] * len(llm), list[list[float]]()
    for stage, row in enumerate(guesses):
        of_kinds = [
            [rate.of(cost) for cost in llm]
            if (rate := rates.get((kind, stage)))
            else [time * unit * m for m in guess.llm]
            for kind, time in zip(LLM, row, strict=True)
        ]
        forward, backward, inputs, weights = of_kinds
        if ("I", stage) in rates:
            backward = [sum(halves) for halves in zip(inputs, weights, strict=True)]
        parts = [sum(times) for times in zip(parts, forward, backward, strict=True)]
        means = (sum(times) / len(llm) for times in of_kinds)
        rows.append([max(mean, least) if time else 0.0 for mean, time in zip(means, row, strict=True)])
    of_media = _items(rates.get(("EF", None)), guess.media, media, unit, peers, least)
    of_targets = _items(rates.get(("G", None)), guess.targets, targets, unit, peers, least)
    per_rank = [virtual_stages * sum(column) / len(rows) for column in zip(*rows, strict=True)]
    occurring: dict[str, float] = {k: time for k, time in zip(LLM, per_rank, strict=True) if getattr(guess.costs, k)}
    forward, generator = _total(of_media) / len(llm), _total(of_targets) / len(llm)
    nested = {"EF": forward, "EB": _backward(guess, rates, media, forward), "G": generator}
    costs = replace(guess.costs, **occurring, **nested, latency=guess.costs.latency * unit)
    return Work(costs, rows, [len(llm) * part / sum(parts) for part in parts], of_media, of_targets)


def _backward(guess: Work, rates: Rates, media: OwnedCosts, forward: float) -> float:
    """The time of the encoder's backward for a mean microbatch, whose forward takes `forward`."""
    if not guess.costs.EB or not guess.costs.EF:
        return 0.0
    known, backward = rates.get(("EF", None)), rates.get(("EB", None))
    ratio = guess.costs.EB / guess.costs.EF
    costs = [cost for row in media for _, cost in row]
    if known and backward and (forwards := sum(map(known.of, costs))):
        ratio = sum(map(backward.of, costs)) / forwards
    return max(forward * ratio, NEGLIGIBLE * forward)


def _items(
    rate: Rate | None, guess: OwnedCosts, costs: OwnedCosts, unit: float, peers: int, least: float
) -> OwnedCosts:
    """The times of items in seconds."""
    if rate is None:
        return [[(owner, time * unit) for owner, time in row] for row in guess]
    return [[(owner, max(rate.of(cost) / peers, least)) for owner, cost in row] for row in costs]


def _times(items: OwnedCosts) -> list[tuple[float, ...]]:
    return [tuple(time for _, time in row) for row in items]


def _total(items: OwnedCosts) -> float:
    return sum(time for row in items for _, time in row)


def _scaled(items: OwnedCosts, cost: float) -> OwnedCosts:
    """Item costs as times, scaled so that the mean microbatch takes `cost`."""
    total = _total(items)
    factor = cost * len(items) / total if total else 0.0
    return [[(owner, time * factor) for owner, time in row] for row in items]


def of_equal_work(rates: Rates, group_size: int) -> Rates:
    """Rates by which all microbatches take the mean time, and an item of cost 1 takes as long as an equal part of the
    mean rank's work for a group of as many items."""
    return {
        key: Rate(0.0, rate.mean / group_size, rate.mean) if key[1] is None else Rate(rate.mean, 0.0, rate.mean)
        for key, rate in rates.items()
    }


class SharedRates:
    """`Rates` in shared memory: the training process writes them, and the DataLoader's workers read them."""

    def __init__(self, stages: int) -> None:
        nested: list[RateKey] = [(kind, None) for kind in NESTED]
        self._keys: list[RateKey] = [*nested, *((kind, stage) for stage in range(stages) for kind in LLM)]
        self._numbers = torch.full((len(self._keys), 3), math.nan, dtype=torch.float64).share_memory_()

    def set(self, rates: Rates | None) -> None:
        unknown = (math.nan,) * 3
        known = {key: (rate.each, rate.per_cost, rate.mean) for key, rate in (rates or {}).items()}
        self._numbers.copy_(torch.tensor([known.get(key, unknown) for key in self._keys], dtype=torch.float64))

    def get(self) -> Rates | None:
        rows = zip(self._keys, self._numbers.tolist(), strict=True)
        return {key: Rate(*row) for key, row in rows if not math.isnan(row[0])} or None
