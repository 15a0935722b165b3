"""ZBV (Qi et al. 2023, arXiv 2401.10241, section 6): two stages per rank in V shape, with split backwards.

Rank r has the stages r (`down`) and 2P - 1 - r (`up`). So rank 0 has both the first stage and the last stage, where the
losses are computed and the backwards begin. The loops below are the phases of the schedule if F, I and W take equally
long: warm-up (the first three loops), steady state, cool-down.
"""

from bigmac_lightning.schedule.backbones.base import Orders
from bigmac_lightning.schedule.backbones.lists import RankList


def zbv(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 2) -> Orders:
    """Return every rank's actions.

    The phases need at least 2P - 1 microbatches. For fewer, the list for 2P - 1 is built and the actions of the others
    are removed.
    """
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
