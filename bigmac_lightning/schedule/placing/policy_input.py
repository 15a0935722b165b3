"""What a policy is given beside the plan that it completes."""

from collections.abc import Sequence
from dataclasses import dataclass

from bigmac_lightning.schedule.simulate import Timeline
from bigmac_lightning.schedule.workload import Workload


@dataclass(frozen=True)
class PolicyInput:
    """What a policy is given beside a plan that holds the bare backbone.

    Attributes:
        bare: the simulated bare backbone.
        workload: the work of each microbatch, where they differ.
        max_encoder_units: most encoder units that a rank may have alive. Only `filled` uses it; what other policies
            make is checked by ``verify``.
        pieces: in how many pieces an encoder share may be cut: one number for all, or one per group and rank.
    """

    bare: Timeline
    workload: Workload | None = None
    max_encoder_units: float | None = None
    pieces: int | Sequence[Sequence[int]] = 1
