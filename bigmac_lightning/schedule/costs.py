"""Times of the kinds of actions.

Knows which kinds occur; knows nothing of plans.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from bigmac_lightning.schedule.action import Kind

NEGLIGIBLE = 1e-6
"""The time of work that is said to cost nothing, as a fraction of other work."""


@dataclass(frozen=True)
class Costs:
    """Times, in any one unit. A kind whose cost is 0 does not occur in a plan.

    Without F there is no plan; without B (evaluation) there is no I, W and EB; without EF there is no EB.

    Attributes:
        F: forward of one stage on one microbatch.
        B: its full backward; 0 for evaluation.
        I: its backward as far as input gradients, in backbones that split the backward.
        W: the rest of that backward: weight gradients.
        EF: encoder forward of one microbatch on one rank; 0: no encoder.
        EB: its backward; 0: the encoder is frozen.
        G: generator forward and backward of one microbatch on one rank; 0: no generator.
        latency: added to every dependency between two ranks.
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
            raise ValueError("costs.F is 0; expected more, as every plan has forwards")

    @cached_property
    def kinds(self) -> frozenset[Kind]:
        """The kinds that may occur in a plan."""
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
        """With some kinds that occur or do not, whatever their costs are: what is said to cost nothing, and is done
        nevertheless, costs next to nothing."""
        least = NEGLIGIBLE * self.F
        return replace(
            self, **{kind: max(getattr(self, kind), least) if there else 0.0 for kind, there in kinds.items()}
        )

    def per_stage(self, virtual_stages: int) -> "Costs":
        """The costs of one stage, where F, B, I and W are those of all the `virtual_stages` stages of a rank."""
        parts = {name: getattr(self, name) / virtual_stages for name in ("F", "B", "I", "W")}
        return replace(self, **parts)
