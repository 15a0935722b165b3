"""ZB1P, one stage per rank: a zero-bubble schedule with the memory of 1F1B (Qi et al. 2023, arXiv 2401.10241, where it
is called ZB-H1).

It is 1F1B with each backward split into I (input gradients), for which the rank before waits, and W (weight gradients),
for which no action waits.
"""

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Orders


def zb1p(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 1) -> Orders:
    """Return every rank's actions. On stage s, the W of a microbatch comes after the I of the s-th microbatch after it.

    This keeps P microbatches in flight on all ranks, since the warm-up of stage s is s forwards shorter than that of
    stage 0. If F, I and W take equally long, this is the greedy choice: a W runs when its memory is needed for the next
    forward, or when no other action can run.
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
