"""Looped breadth-first pipeline (Lamy-Poirier 2022, arXiv 2211.05953), with V stages per rank.

All microbatches pass the first stage of a rank, then its next stage, and so on. The backwards run in the opposite
order.
"""

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Orders


def looped_bfs(pipeline_parallel_size: int, microbatches: int, virtual_stages: int) -> Orders:
    """Return every rank's actions: all forwards stage by stage, then all backwards in exactly the opposite order."""
    orders: Orders = []
    for rank in range(pipeline_parallel_size):
        stages = range(rank, pipeline_parallel_size * virtual_stages, pipeline_parallel_size)
        forwards = [("F", microbatch, stage) for stage in stages for microbatch in range(microbatches)]
        backwards = [Action("B", microbatch, stage) for _, microbatch, stage in reversed(forwards)]
        orders.append([Action("F", microbatch, stage) for _, microbatch, stage in forwards] + backwards)
    return orders
