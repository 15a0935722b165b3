"""The input of a policy, besides the plan that it completes."""

from collections.abc import Sequence
from dataclasses import dataclass

from bigmac_lightning.schedule.simulate import Timeline
from bigmac_lightning.schedule.workload import Workload


@dataclass(frozen=True)
class PolicyInput:
    """The input of a policy, besides a plan whose lists have only the bare backbone's actions.

    Attributes:
        bare: the simulated timeline of the bare backbone.
        workload: the work of each microbatch, where microbatches differ.
        max_encoder_units: limit on the encoder units alive on a rank. Only `filled` uses it; the plans of other
            policies are checked by ``verify``.
        pieces: largest number of pieces of an encoder share: one number for all shares, or one per group and rank.
    """

    bare: Timeline
    workload: Workload | None = None
    max_encoder_units: float | None = None
    pieces: int | Sequence[Sequence[int]] = 1
