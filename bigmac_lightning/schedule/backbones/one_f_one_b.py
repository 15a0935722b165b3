"""1F1B (PipeDream-Flush, Narayanan et al. 2021, arXiv 2006.09503), one stage per rank: after a warm-up, forwards and
backwards alternate."""

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.backbones.base import Orders


def one_f_one_b(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 1) -> Orders:
    """Return every rank's actions. The warm-up of stage s has P - 1 - s forwards, as many as there are later stages, so
    that its first backward comes when the first gradient can arrive."""
    assert virtual_stages == 1
    orders: Orders = []
    for stage in range(pipeline_parallel_size):
        warm_up = min(microbatches, pipeline_parallel_size - 1 - stage)
        actions = [Action("F", microbatch, stage) for microbatch in range(warm_up)]
        for backward in range(microbatches):
            if warm_up + backward < microbatches:
                actions.append(Action("F", warm_up + backward, stage))
            actions.append(Action("B", backward, stage))
        orders.append(actions)
    return orders
