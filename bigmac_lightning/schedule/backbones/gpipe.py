"""GPipe (Huang et al. 2019, arXiv 1811.06965), one stage per rank: all forwards, then all backwards."""

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Orders


def gpipe(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 1) -> Orders:
    """Return every rank's actions."""
    assert virtual_stages == 1
    return [
        [Action(kind, microbatch, stage) for kind in ("F", "B") for microbatch in range(microbatches)]
        for stage in range(pipeline_parallel_size)
    ]
