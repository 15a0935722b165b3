"""ZB1P (zero bubble with 1F1B's memory: Qi et al. 2023, arXiv 2401.10241, there ZB-H1), one stage per rank.

1F1B with the backward split in I (input gradients), which the rank before waits for, and W (weight gradients), which
nobody waits for.
"""

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Orders


def zb1p(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 1) -> Orders:
    """Every rank's actions: stage s does W s microbatches after I, which keeps P microbatches in flight on all ranks.

    Where F, I and W take equally long this is the greedy choice: a W is done when its memory is needed, or nothing
    else can be.
    """
    assert virtual_stages == 1
    orders: Orders = []
    for stage in range(pipeline_parallel_size):
        warm_up = min(microbatches, pipeline_parallel_size - 1 - stage)
        actions = [Action("F", microbatch, stage) for microbatch in range(warm_up)]
        for backward in range(microbatches):
            if warm_up + backward < microbatches:
                actions.append(Action("F", warm_up + backward, stage))
            actions.append(Action("I", backward, stage))
            if backward >= stage:
                actions.append(Action("W", backward - stage, stage))
        late = range(max(0, microbatches - stage), microbatches)
        orders.append(actions + [Action("W", microbatch, stage) for microbatch in late])
    return orders
