"""GPipe (Huang et al. 2019, arXiv 1811.06965): all forwards, then all backwards.

Knows one stage per rank; knows nothing of costs.
"""

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Orders


def gpipe(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 1) -> Orders:
    """Every rank's actions."""
    assert virtual_stages == 1
    return [
        [Action(kind, microbatch, stage) for kind in ("F", "B") for microbatch in range(microbatches)]
        for stage in range(pipeline_parallel_size)
    ]
