"""Times of the kinds of actions, and which kinds occur in a plan."""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from bigmac_lightning.schedule.action import Kind

NEGLIGIBLE = 1e-6
"""Time of a computation that is executed although its cost is given as 0, as a fraction of the time of others.

It was chosen small beside every measured time, and far above rounding errors.
"""


@dataclass(frozen=True)
class Costs:
    """Times of the actions, all in the same unit, which may be any. A kind whose cost is 0 does not occur in a plan.

    F must not be 0. If B is 0 (evaluation), I, W and EB do not occur; if EF is 0, EB does not occur.

    Attributes:
        F: forward of one stage on one microbatch.
        B: full backward of one stage on one microbatch; 0 means evaluation.
        I: the part of that backward that computes input gradients, in backbones that split the backward.
        W: the part of that backward that computes weight gradients.
        EF: encoder forward of one whole microbatch on one rank; 0 means that there is no encoder.
        EB: encoder backward of one whole microbatch on one rank; 0 means that the encoder is frozen.
        G: generator forward and backward of one whole microbatch on one rank; 0 means that there is no generator.
        latency: time that passes before the result of an action can be used on another rank.

    Raises:
        ValueError: a time is negative or not finite, or F is 0.
    """

    F: float = 1.0
    B: float = 2.0
    I: float = 1.0  # noqa: E741
    W: float = 1.0
    EF: float = 1.0
    EB: float = 2.0
    G: float = 0.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"costs.{name} is {value}; expected a finite number of at least 0")
        if self.F == 0:
            raise ValueError("costs.F is 0; expected a time above 0, as every plan has forwards")

    @cached_property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of actions that occur in a plan with these costs."""
        kinds: list[Kind] = ["F"]
        if self.B:
            kinds.append("B")
        if self.B and self.I and self.W:
            kinds.extend(("I", "W"))
        if self.EF:
            kinds.append("EF")
        if self.EF and self.EB and self.B:
            kinds.append("EB")
        if self.G:
            kinds.append("G")
        return frozenset(kinds)

    def occurring(self, **kinds: bool) -> "Costs":
        """Return the costs with the given kinds made to occur (True) or not to occur (False).

        The cost of a kind that occurs is raised to ``NEGLIGIBLE`` times F if it is less, because 0 would leave it out.
        """
        least = NEGLIGIBLE * self.F
        return replace(
            self, **{kind: max(getattr(self, kind), least) if occurs else 0.0 for kind, occurs in kinds.items()}
        )

    def per_stage(self, virtual_stages: int) -> "Costs":
        """Return the costs of one stage, if F, B, I and W of these costs are for all `virtual_stages` stages of a
        rank."""
        return replace(self, **{name: getattr(self, name) / virtual_stages for name in ("F", "B", "I", "W")})
