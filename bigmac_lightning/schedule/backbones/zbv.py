"""ZBV (Qi et al. 2023, arXiv 2401.10241, section 6): two stages per rank in V shape, with split backwards.

Rank r has the stages r ("down") and 2P - 1 - r ("up"), so that losses and first backwards are on rank 0.
"""

from bigmac_lightning.schedule.backbones.base import Orders
from bigmac_lightning.schedule.backbones.lists import RankList


def zbv(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 2) -> Orders:
    """Every rank's actions. Fewer microbatches than fill the pipeline are the first ones of a full one."""
    assert virtual_stages == 2
    size, full = pipeline_parallel_size, max(microbatches, 2 * pipeline_parallel_size - 1)
    orders: Orders = []
    for rank in range(size):
        down, up, actions = rank, 2 * size - 1 - rank, RankList()
        for _ in range(2 * (size - rank) - 1):
            actions.add(down, "F")
        for _ in range(rank):
            actions.add(up, "F")
            actions.add(down, "F")
        for _ in range(size - rank):
            actions.add(up, "FI")
            actions.add_weights()
        while actions.count("F", up) < full:
            if actions.count("F", down) < full:
                actions.add(down, "F")
            actions.add(down, "I")
            actions.add_weights()
            actions.add(up, "FI")
            actions.add_weights()
        for _ in range(rank):
            actions.add(down, "I")
            actions.add(up, "I")
        for _ in range(size - rank):
            actions.add(down, "I")
            actions.add_weights(down)
        actions.add_weights(up, most=full)
        actions.add_weights(down, most=full)
        orders.append(actions.first(microbatches))
    return orders
