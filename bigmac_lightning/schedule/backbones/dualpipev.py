"""DualPipeV (DeepSeek's DualPipe, arXiv 2412.19437, cut in half: github.com/deepseek-ai/DualPipe, dualpipev.py).

Two stages per rank in V shape: rank r has the stages r ("down") and 2P - 1 - r ("up"). A forward of one and a backward
of the other stand next to each other, so that a runtime may overlap them; Ws are split off in warm-up and cool-down.
"""

from bigmac_lightning.schedule.backbones.base import Orders
from bigmac_lightning.schedule.backbones.lists import RankList


def dualpipev(pipeline_parallel_size: int, microbatches: int, virtual_stages: int = 2) -> Orders:
    """Every rank's actions. Fewer microbatches than fill the pipeline are the first ones of a full one."""
    assert virtual_stages == 2
    size, full = pipeline_parallel_size, max(microbatches, 2 * pipeline_parallel_size)
    orders: Orders = []
    for rank in range(size):
        down, up, actions, later = rank, 2 * size - 1 - rank, RankList(), size - 1 - rank
        for _ in range(2 * later):
            actions.add(down, "F")
        for _ in range(rank + 1):
            actions.add(down, "F")
            actions.add(up, "F")
        for _ in range(later):
            actions.add(up, "I")
            actions.add_weights()
            actions.add(up, "F")
        for _ in range(full - 2 * size + rank + 1):
            actions.add(down, "F")
            actions.add(up, "BF")
            actions.add(down, "B")
        for _ in range(later):
            actions.add(up, "BF")
            actions.add(down, "B")
        for step in range(2 * (rank + 1)):  # the second half split, so that the ranks before wait less
            actions.add(down if step % 2 else up, "I" if step > rank else "B")
        for _ in range(later):
            actions.add_weights()
            actions.add(down, "I")
        actions.add_weights(most=full)
        orders.append(actions.first(microbatches))
    return orders
