"""GPipe (Huang et al. 2019, arXiv 1811.06965): all forwards, then all backwards.

Knows one stage per rank; knows nothing of costs.
"""

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Orders


def gpipe(pipeline_parallel_size: int, microbatches: int, extra_in_flight: int = 0) -> Orders:
    """Every rank's actions. All microbatches are in flight anyway, so that `extra_in_flight` changes nothing."""
    del extra_in_flight
    return [
        [Action(kind, microbatch, stage) for kind in ("F", "B") for microbatch in range(microbatches)]
        for stage in range(pipeline_parallel_size)
    ]
