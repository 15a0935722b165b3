"""How long actions take, as a function of their work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from bigmac_lightning.schedule.action import Kind

RateKey = tuple[Kind, int | None]
"""A kind of action and, for F, B, I and W, the stage."""

Rates = Mapping[RateKey, "Rate"]
"""What is known of the actions of a pipeline."""

FAR = 2.0
"""A sample that took so many times as long as the fitted line says was disturbed by something else, and is left out.
Actions of equal work differ by a few percent on a device that nothing else uses."""


class Sample(NamedTuple):
    """One action that was timed.

    Attributes:
        items: media items of an EF or EB, targets of a G; a microbatch of an action of the LLM is one item.
        cost: the sum of the items' costs.
        seconds: how long it took.
    """

    items: float
    cost: float
    seconds: float


@dataclass(frozen=True)
class Rate:
    """The time of the actions of one kind: a line through samples.

    Attributes:
        each: seconds of each item, whatever its cost.
        per_cost: seconds of each unit of the items' costs.
        mean: seconds of the mean sample.
    """

    each: float
    per_cost: float
    mean: float

    def of(self, cost: float) -> float:
        """Seconds of an item."""
        return self.each + self.per_cost * cost

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> "Rate | None":
        """The line with the least squares of errors, without the samples that are far from it; ``None`` if no sample
        had any work."""
        kept = [sample for sample in samples if sample.items]
        if not kept:
            return None
        each, per_cost = _least_squares(kept)
        for _ in range(2):
            ratios = [s.seconds / max(each * s.items + per_cost * s.cost, 1e-12) for s in kept]
            middle = median(ratios)
            kept = [s for s, ratio in zip(kept, ratios, strict=True) if ratio <= FAR * middle]
            each, per_cost = _least_squares(kept)
        return cls(each, per_cost, sum(s.seconds for s in kept) / len(kept))


def described(rates: Rates) -> str:
    """The mean times of actions in milliseconds, and by how much stages differ."""
    kinds, texts = dict.fromkeys(kind for kind, _ in rates), list[str]()
    for kind in kinds:
        times = [rate.mean * 1e3 for (known, _), rate in rates.items() if known == kind]
        mean = sum(times) / len(times)
        differ = f" (stages: {min(times) / mean:.2f} to {max(times) / mean:.2f} of it)" if len(times) > 1 else ""
        texts.append(f"{kind} {mean:.3g} ms{differ}")
    return ", ".join(texts)


def mean_rate(found: Sequence[tuple[Rate, float]]) -> Rate:
    """The mean of rates with weights."""
    total = sum(weight for _, weight in found)
    columns = ("each", "per_cost", "mean")
    return Rate(*(sum(getattr(rate, name) * weight for rate, weight in found) / total for name in columns))


def _least_squares(samples: Sequence[Sample]) -> tuple[float, float]:
    """The seconds of each item and of each unit of cost, neither negative, with the least squares of errors."""
    nn = sum(s.items * s.items for s in samples)
    nc = sum(s.items * s.cost for s in samples)
    cc = sum(s.cost * s.cost for s in samples)
    nt = sum(s.items * s.seconds for s in samples)
    ct = sum(s.cost * s.seconds for s in samples)
    determinant = nn * cc - nc * nc
    if determinant > 1e-6 * nn * cc:  # otherwise items have nearly equal costs
        each, per_cost = (nt * cc - ct * nc) / determinant, (ct * nn - nt * nc) / determinant
        if each >= 0 and per_cost >= 0:
            return each, per_cost
        errors = {(nt / nn, 0.0): -nt * nt / nn, (0.0, ct / cc): -ct * ct / cc}
        return min(errors, key=errors.__getitem__)
    return (0.0, ct / cc) if cc else (nt / nn, 0.0)
